"""Any model's linears recorded on lm-eval tasks, beside each document run alone in float64."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from jobs.spec import CalibrationSpec
from quantcore.errors import SpecError
from quantcore.recorder import Recorder
from tests.references import second_moment
from tests.task_files import texts, write_task
from tests.test_task_calibration_job import DOCUMENTS, inputs_of
from workers.documents import task_windows
from workers.plan import PADDING
from workers.recording import calibrate


@pytest.fixture
def options(tmp_path: Path) -> dict[str, Any]:
    write_task(tmp_path, "ships", {"training": texts(*DOCUMENTS), "test": texts("The sea.")})
    return {"tasks": ["ships"], "task_folder": tmp_path, "sequences": 20, "length": 40}


@pytest.fixture
def loaded(model_folder: Callable[..., Path]) -> tuple[nn.Module, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = model_folder("llama")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("short", ["pad", "drop"])
def test_statistics_are_those_of_the_documents_alone(
    loaded: tuple[nn.Module, Any],
    options: dict[str, Any],
    model_folder: Callable[..., Path],
    short: str,
) -> None:
    options = {**options, "short": short}
    model, tokenizer = loaded
    spec = CalibrationSpec.model_validate({**options, "tasks": ("ships",)})
    ids_SL = task_windows(spec, tokenizer).ids_SL
    expected = inputs_of(model_folder("llama"), [ids_L[ids_L != PADDING] for ids_L in ids_SL])
    recorder = calibrate(model, tokenizer, **options, batch=3)
    assert set(recorder) == set(expected)
    for name, x_TI in expected.items():
        found = recorder[name]
        assert found.moments is not None and found.ranges is not None
        assert (found.moments.tokens, found.moments.dropped) == (len(x_TI), 0)
        h_II = torch.from_numpy(second_moment(x_TI))
        scale = float(h_II.abs().max())
        torch.testing.assert_close(
            found.moments.mean().double(), h_II, rtol=1e-4, atol=1e-5 * scale
        )
        high_I = x_TI.amax(0).clamp(min=0)
        torch.testing.assert_close(found.ranges.high_I.double(), high_I, rtol=1e-3, atol=1e-4)


def test_a_recorder_of_ones_own_says_what_is_watched(
    loaded: tuple[nn.Module, Any], options: dict[str, Any]
) -> None:
    model, tokenizer = loaded
    own = Recorder(model, lambda name, _: name.endswith("down_proj"), ranges=False)
    recorder = calibrate(model, tokenizer, **options, recorder=own)
    assert recorder is own
    assert [name.split(".")[2] for name in recorder] == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"short": "cut"}, r"^short: Input should be 'pad', 'drop' or 'join'"),
        ({"length": 1}, r"^length: Input should be greater than 1"),
        ({"tasks": []}, r"^tasks: name one source of texts"),
        ({"sequences": 99}, r"calibration.sequences: 99 sequences .*: write sequences: 40, or"),
    ],
)
def test_bad_options_are_refused_by_name(
    loaded: tuple[nn.Module, Any], options: dict[str, Any], wrong: dict[str, Any], message: str
) -> None:
    with pytest.raises(SpecError, match=message):
        calibrate(*loaded, **{**options, **wrong})
