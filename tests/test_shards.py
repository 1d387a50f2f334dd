"""Shards calibrate at once, each from the hidden states of the model as the source has it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import orchestrator.block
from orchestrator.checks import check
from orchestrator.driver import run_job
from orchestrator.executors import InProcessExecutor
from orchestrator.loop import Observer
from tests.conftest import BLOCKS
from tests.faults import Kill, KillingExecutor, schedule
from tests.references import output_error, second_moment
from workers.layout import block_key
from workers.plan import Plan
from workers.publish import decoded_weights, published_tensors
from workers.store import open_store

JobFile = Callable[..., Path]
QUANTIZATION = {"scheme": "int4", "group_size": 32, "method": "gptq", "range": "minmax"}


def _job(job_file: JobFile, text_file: Path, name: str, shards: int) -> Path:
    calibration = {"text": str(text_file), "sequences": 8, "length": 32, "shards": shards}
    return job_file(name, calibration=calibration, quantization=QUANTIZATION)


def _run(job: Path, start: Callable[[Plan], Any]) -> tuple[Plan, dict[str, bytes], dict[str, Any]]:
    prepared = check(job)
    result = run_job(prepared, start, Observer())
    folder = Path(result.store) / "model"
    files = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    return prepared.plan, files, result.report


def _workers(count: int) -> Callable[[Plan], InProcessExecutor]:
    return lambda plan: InProcessExecutor(plan, ["cpu"] * count)


def _source_inputs(plan: Plan, folder: Path) -> dict[str, torch.Tensor]:
    """What every linear of the untouched model is handed, by transformers and a hook."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    inputs: dict[str, torch.Tensor] = {}

    def note(name: str) -> Any:
        def hook(_module: Any, args: tuple[torch.Tensor, ...]) -> None:
            inputs[name] = args[0].flatten(0, -2).clone()

        return hook

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(note(name))
    with torch.no_grad():
        model(torch.tensor(np.asarray(plan.tokens), dtype=torch.int64))
    return inputs


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_a_shard_begins_at_the_source_and_goes_on_from_what_it_quantized(
    job_file: JobFile, text_file: Path, model_folder: Callable[..., Path], shards: int
) -> None:
    """The errors that a block reports are those on the source's own inputs where, and only
    where, a shard begins."""
    plan, _, report = _run(_job(job_file, text_file, "job", shards), _workers(2))
    inputs = _source_inputs(plan, model_folder("llama"))
    told = {line["layer"]: line["relative_output_error"] for line in report["layers"]}
    source = check(_job(job_file, text_file, "job", shards)).source
    begins = {first for first, _ in plan.shard_ranges()}
    assert len(begins) == shards
    for index, block in enumerate(plan.blocks):
        layers = list(block.quantized())
        store = open_store(plan.store)
        tensors = published_tensors(store, block_key(index))
        quantized = decoded_weights(tensors, plan, index, torch.device("cpu"))
        original = dict(source.read(f"{layer.name}.weight" for layer in layers))
        apart = []
        for layer in layers:
            name = f"{layer.name}.weight"
            h_II = second_moment(inputs[layer.name])
            error = output_error(original[name] - quantized[name], h_II)
            relative = (error / output_error(original[name], h_II)) ** 0.5
            apart.append(abs(told[layer.name] / relative - 1))
        assert max(apart) < 1e-4 if index in begins else max(apart) > 1e-3


@pytest.mark.parametrize("shards", [2, 3])
def test_any_number_of_workers_gives_the_same_bytes(
    job_file: JobFile, text_file: Path, shards: int
) -> None:
    """Fewer workers than shards, as many, and more; and one that was resumed by another number."""
    _, first, _ = _run(_job(job_file, text_file, "w1", shards), _workers(1))
    for count in (2, 3, 5):
        _, files, _ = _run(_job(job_file, text_file, f"w{count}", shards), _workers(count))
        assert files == first


def test_shards_differ_from_the_sequential_method(job_file: JobFile, text_file: Path) -> None:
    _, one, _ = _run(_job(job_file, text_file, "one", 1), _workers(1))
    _, two, _ = _run(_job(job_file, text_file, "two", 2), _workers(1))
    same = {name for name in one if one[name] == two.get(name)}
    blocks = sorted(name for name in one if name.startswith("block-") and name in same)
    assert [name[:11] for name in blocks] == ["block-00000"]  # the first shard's only block


@pytest.mark.parametrize("seed", range(6))
def test_kills_change_no_bit(job_file: JobFile, text_file: Path, seed: int) -> None:
    shards = 2 + seed % 2
    _, whole, _ = _run(_job(job_file, text_file, "whole", shards), _workers(1))
    kills = [*schedule(seed, BLOCKS), Kill("Boundary", -1, seed % 3 == 0, "gone")]
    executors: list[KillingExecutor] = []

    def start(plan: Plan) -> KillingExecutor:
        executors.append(KillingExecutor(plan, 3, kills))
        return executors[0]

    _, files, _ = _run(_job(job_file, text_file, "killed", shards), start)
    assert executors[0].killed
    assert files == whole


def test_a_sharded_job_goes_on_after_its_driver_died(job_file: JobFile, text_file: Path) -> None:
    _, whole, _ = _run(_job(job_file, text_file, "whole", 3), _workers(1))

    class Dies(Observer):
        def finished(self, assignment: Any, result: Any) -> None:
            if assignment.id.startswith("publish/1"):
                raise KeyboardInterrupt

    job = _job(job_file, text_file, "broken", 3)
    with pytest.raises(KeyboardInterrupt):
        run_job(check(job), _workers(2), Dies())
    _, files, _ = _run(job, _workers(4))
    assert files == whole


def test_row_bands_change_no_bit(
    job_file: JobFile, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, whole, _ = _run(_job(job_file, text_file, "whole", 1), _workers(3))
    monkeypatch.setattr(orchestrator.block, "BAND_BYTES", 1)
    reduced = []

    class Notes(Observer):
        def finished(self, assignment: Any, result: Any) -> None:
            reduced.append(assignment.id.startswith("reduce/"))

    prepared = check(_job(job_file, text_file, "bands", 1))
    result = run_job(prepared, _workers(3), Notes())
    folder = Path(result.store) / "model"
    assert sum(reduced) == BLOCKS * 4 * 3
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == whole


def test_more_shards_than_blocks_are_refused(job_file: JobFile, text_file: Path) -> None:
    from quantcore.errors import JobFaults

    with pytest.raises(JobFaults, match=f"calibration.shards: the model has {BLOCKS} blocks"):
        check(_job(job_file, text_file, "job", BLOCKS + 1))
