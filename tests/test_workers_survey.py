"""What the survey tells of a model: the hash of each tensor's bytes, and any value not finite."""

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import workers.sources.folder
from quantcore.errors import SourceError
from workers.sources.folder import SafetensorsFolder
from workers.survey import survey

TENSORS = {
    "whole": torch.arange(5000, dtype=torch.float32),
    "half": torch.randn(700, 3).to(torch.bfloat16),
    "eighth": torch.randn(99).to(torch.float8_e4m3fn),
    "count": torch.tensor([3, 4]),
    "said": torch.tensor([True, False, True]),
    "nothing": torch.zeros(0, 4),
    "one": torch.tensor(2.5),
}


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers.sources.folder, "PIECE_BYTES", 1024)
    monkeypatch.setattr(workers.survey, "_PIECE", 256)


def _folder(path: Path, tensors: dict[str, Tensor]) -> SafetensorsFolder:
    (path / "config.json").write_text('{"model_type": "llama"}')
    save_file(tensors, path / "model.safetensors")
    return SafetensorsFolder(path)


class Held:
    """A source that hands over tensors, as one that is not on this machine does."""

    path = Path("far")
    pieces = None

    def read(self, names: object) -> object:
        return iter(TENSORS.items())


@pytest.mark.parametrize("threads", [1, 3])
def test_hashes_are_of_the_bytes_however_they_are_read(tmp_path: Path, threads: int) -> None:
    source = _folder(tmp_path, TENSORS)
    wanted = {
        name: hashlib.sha256(t.flatten().view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, t in TENSORS.items()
    }
    assert survey(source, TENSORS, threads) == wanted
    assert survey(Held(), TENSORS, threads) == wanted  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e5m2])
def test_what_is_not_finite_is_counted_through_all_pieces(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    bad = torch.randn(4000)
    bad[[0, 1999, 3999]] = torch.tensor([float("nan"), float("inf"), float("-inf")])
    source = _folder(tmp_path, {"fine": torch.zeros(3), "bad": bad.to(dtype)})
    with pytest.raises(SourceError, match=r"'bad' in .* has 3 values that are not finite"):
        survey(source, ["fine", "bad"])


def test_a_file_that_became_shorter_is_told(tmp_path: Path) -> None:
    source = _folder(tmp_path, TENSORS)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-3000])
    with pytest.raises(SourceError, match=r"model\.safetensors ends within '.*'. Fetch it again"):
        survey(source, TENSORS)
