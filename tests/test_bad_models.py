"""Every bad model ends with one clear line, its exit code, and nothing written."""

import json
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

JobFile = Callable[..., Path]
Refused = Callable[..., str]
_CONFIG, _WEIGHTS, _INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"


def _truncated(model: Path) -> None:
    data = (model / _WEIGHTS).read_bytes()
    (model / _WEIGHTS).write_bytes(data[: len(data) // 2])


def _relabelled(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    """The same tensors behind a header in which one entry tells lies."""

    def edit(model: Path) -> None:
        data = (model / _WEIGHTS).read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        change(header["model.norm.weight"])
        text = json.dumps(header).encode()
        (model / _WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])

    return edit


def _indexed(file: str) -> Callable[[Path], None]:
    def edit(model: Path) -> None:
        weight_map = dict.fromkeys(load_file(model / _WEIGHTS), _WEIGHTS)
        weight_map["model.norm.weight"] = file
        (model / _INDEX).write_text(json.dumps({"weight_map": weight_map}))

    return edit


def _without_a_tensor(model: Path) -> None:
    tensors = load_file(model / _WEIGHTS)
    del tensors["model.norm.weight"]
    save_file(tensors, model / _WEIGHTS, metadata={"format": "pt"})


def _config(**changes: Any) -> Callable[[Path], None]:
    def edit(model: Path) -> None:
        config = json.loads((model / _CONFIG).read_text())
        (model / _CONFIG).write_text(json.dumps({**config, **changes}))

    return edit


def _header_of_zeros(model: Path) -> None:
    (model / _WEIGHTS).write_bytes(b"\xff" * 8 + b"{}")


_WHOLE = "is not a whole safetensors file: .* Fetch it again"
_MODELS: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated": (_truncated, _WHOLE),
    "empty": (lambda model: (model / _WEIGHTS).write_bytes(b"") and None, _WHOLE),
    "header longer than the file": (_header_of_zeros, _WHOLE),
    "offsets beyond the file": (_relabelled(lambda e: e["data_offsets"].append(0)), _WHOLE),
    "offsets past the end": (
        _relabelled(lambda e: e.update(data_offsets=[e["data_offsets"][0], 1 << 60])),
        _WHOLE,
    ),
    "shape that is not its size": (_relabelled(lambda e: e.update(shape=[6400])), _WHOLE),
    "shape beyond all memory": (_relabelled(lambda e: e.update(shape=[1 << 62] * 2)), _WHOLE),
    "unknown dtype": (_relabelled(lambda e: e.update(dtype="F7")), _WHOLE),
    "index that names a missing file": (_indexed("nope.safetensors"), "names nope.safetensors, "),
    "index that leaves its folder": (_indexed("../x.safetensors"), "names a file outside its fol"),
    "index that names /": (_indexed("/x.safetensors"), "names a file outside its folder: '/x"),
    "index that is none": (
        lambda model: (model / _INDEX).write_text('{"weight_map": [1]}') and None,
        "is not a safetensors index",
    ),
    "tensor that is not there": (_without_a_tensor, "the checkpoint lacks 'model.norm.weight'"),
    "config of another shape": (
        _config(intermediate_size=96),
        "has shape .* in the checkpoint, but .* by its config",
    ),
    "config that is no JSON": (
        lambda model: (model / _CONFIG).write_text("{") and None,
        "config.json does not load: ",
    ),
    "no config": (lambda model: (model / _CONFIG).unlink(), "has no config.json"),
    "quantized already": (
        _config(quantization_config={"quant_method": "awq"}),
        r"the model is quantized already \(awq\): name the model it was made from",
    ),
}


@pytest.mark.parametrize("case", _MODELS)
def test_a_bad_model_is_refused(
    case: str,
    tmp_path: Path,
    model_folder: Callable[..., Path],
    job_file: JobFile,
    refused: Refused,
) -> None:
    edit, message = _MODELS[case]
    model = shutil.copytree(model_folder("llama"), tmp_path / "model")
    edit(model)
    said = refused(3, "run", job_file(model={"path": "model"}))
    assert re.search(rf"\.yaml:\d+:3: model.path: .*{message}", said)


@pytest.mark.parametrize(
    ("model", "code", "message"),
    [
        ("mixtral", 3, r"model.path: 'mixtral' is a mixture of experts \(\w+: 4\), which is not h"),
        ("gpt2", 2, r"quantization.scheme: .* no Conv1D layers: .*'transformer.h.0.attn.c_attn'"),
    ],
)
def test_an_architecture_that_is_not_handled_is_named(
    model: str,
    code: int,
    message: str,
    model_folder: Callable[..., Path],
    job_file: JobFile,
    refused: Refused,
) -> None:
    job = job_file(model={"path": str(model_folder(model))})
    assert re.search(message, refused(code, "run", job))


def test_a_weight_that_is_no_number_is_found_before_anything_is_written(
    tmp_path: Path, model_folder: Callable[..., Path], job_file: JobFile, refused: Refused
) -> None:
    model = shutil.copytree(model_folder("llama"), tmp_path / "model")
    tensors = load_file(model / _WEIGHTS)
    tensors["model.layers.2.mlp.down_proj.weight"][3, 5] = torch.nan
    save_file(tensors, model / _WEIGHTS, metadata={"format": "pt"})
    job = job_file(model={"path": "model"})
    said = refused(3, "run", "--in-process", "--json", job)
    assert "'model.layers.2.mlp.down_proj.weight'" in said
    assert "has 1 values that are not finite" in said
