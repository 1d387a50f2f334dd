"""Artifacts of every format as models of quantized tensors."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from orchestrator.fetch import fetch
from quantcore import inductor
from quantcore.errors import QuantizationError, SourceError
from quantcore.formats import FORMATS
from quantcore.schemes import Scheme
from quantcore.tensors import Layout, QuantizedTensor
from tests.test_orchestrator_job import JobFile, run_here
from workers.loading import load
from workers.store import open_store

INT4 = {"scheme": "int4", "group_size": 32, "method": "rtn"}
ASYMMETRIC = INT4 | {"symmetric": False}
MIXED = INT4 | {"overrides": [{"match": "*.mlp.*", "scheme": "int8"}]}
TABLE = [
    ("native", INT4),
    ("native", ASYMMETRIC | {"zero_point": "float"}),
    ("native", MIXED),
    ("compressed-tensors", INT4),
    ("compressed-tensors", ASYMMETRIC),
    ("compressed-tensors", {"scheme": "int8", "method": "rtn"}),
    ("compressed-tensors", {"scheme": "int8_dynamic", "method": "rtn"}),
    ("compressed-tensors", {"scheme": "int8_dynamic_int4", "method": "rtn"}),
    ("compressed-tensors", {"scheme": "int8_static", "method": "rtn"}),
    ("compressed-tensors", {"scheme": "float8_dynamic", "group_size": "tensor", "method": "rtn"}),
    ("compressed-tensors", MIXED),
]
IDS = torch.arange(2, 30)[None]


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inductor, "_applied", [True])


@pytest.fixture
def artifact(job_file: JobFile, tmp_path: Path) -> Callable[..., Path]:
    def make(form: str, quantization: dict[str, Any]) -> Path:
        output = {"store": str(tmp_path / "store"), "format": form}
        store = run_here(job_file(quantization=quantization, output=output)).store
        fetch(open_store(store), tmp_path / "out")
        return tmp_path / "out"

    return make


def linears(model: Any) -> dict[str, nn.Linear]:
    found = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    return {name: m for name, m in found.items() if isinstance(m.weight, QuantizedTensor)}


def decoded(folder: Path, form: str, model: Any) -> dict[str, Tensor]:
    """Each weight as the format's own `decode` has it from the files."""
    tensors = {k: v for f in folder.glob("*.safetensors") for k, v in load_file(f).items()}
    dense = {}
    for name, linear in linears(model).items():
        parts = {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(name)}
        scheme = linear.weight.scheme
        assert isinstance(scheme, Scheme)
        dense[name] = FORMATS[form].decode(parts, scheme, linear.in_features)
    return dense


@pytest.mark.parametrize(("form", "quantization"), TABLE, ids=str)
def test_a_loaded_model_holds_what_is_stored(
    form: str, quantization: dict[str, Any], artifact: Callable[..., Path]
) -> None:
    folder = artifact(form, quantization)
    model = load(folder, torch.float32)
    assert len(linears(model)) == 21
    for name, dense in decoded(folder, form, model).items():
        weight: Any = model.get_submodule(name).weight
        assert torch.equal(weight.dequantize(), dense)
        assert weight.num_bytes() < dense.numel() * 2
    assert not isinstance(model.lm_head.weight, QuantizedTensor)
    with torch.no_grad():
        logits = model(IDS).logits
    assert logits.isfinite().all()
    if quantization["scheme"] in ("int4", "int8") and form == "compressed-tensors":
        from transformers import AutoModelForCausalLM

        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            assert torch.allclose(logits, theirs(IDS).logits, rtol=1e-3, atol=1e-4)


def test_a_layout_by_scheme_serves_a_mixed_model(artifact: Callable[..., Path]) -> None:
    folder = artifact("native", MIXED)
    plain = load(folder, torch.bfloat16)
    model = load(folder, torch.bfloat16, layout={"int4": "int4_cpu"})
    kinds = {(m.weight.scheme.name, m.weight.layout_name) for m in linears(model).values()}  # type: ignore[union-attr]
    assert kinds == {("int4", Layout.INT4_CPU), ("int8", Layout.PLAIN)}
    with torch.no_grad():
        wanted = plain(IDS).logits
        assert (model(IDS).logits - wanted).norm() < 0.02 * wanted.norm()
    with pytest.raises(QuantizationError, match=r"mlp.*: layout 'int4_cpu' holds int4, not int8"):
        load(folder, torch.bfloat16, layout="int4_cpu")


def test_a_model_computes_in_another_dtype(artifact: Callable[..., Path]) -> None:
    folder = artifact("compressed-tensors", INT4)
    half, full = load(folder, torch.bfloat16), load(folder, torch.float32)
    assert half.dtype == torch.bfloat16
    with torch.no_grad():
        logits = half(IDS).logits.float()
        wanted = full(IDS).logits
    assert (logits - wanted).norm() < 0.05 * wanted.norm()
    tokens = half.generate(IDS, max_new_tokens=3, do_sample=False)
    assert tokens.shape == (1, IDS.shape[1] + 3)


def test_groups_by_pattern_are_read_as_by_name(artifact: Callable[..., Path]) -> None:
    folder = artifact("compressed-tensors", MIXED)
    told = json.loads((folder / "config.json").read_text())
    before = load(folder, torch.float32)
    groups = told["quantization_config"]["config_groups"]
    for group in groups.values():
        mlp = "mlp" in group["targets"][0]
        group["targets"] = [r"re:.*\.mlp\..*" if mlp else r"re:.*self_attn\..*"]
    (folder / "config.json").write_text(json.dumps(told))
    after = load(folder, torch.float32)
    with torch.no_grad():
        assert torch.equal(after(IDS).logits, before(IDS).logits)


def test_what_cannot_be_read_is_told(artifact: Callable[..., Path]) -> None:
    folder = artifact("compressed-tensors", INT4)
    told = json.loads((folder / "config.json").read_text())
    group = told["quantization_config"]["config_groups"]["group_0"]
    group["weights"]["num_bits"] = 2
    (folder / "config.json").write_text(json.dumps(told))
    with pytest.raises(SourceError, match="no scheme here has its weights"):
        load(folder, torch.float32)
    told["quantization_config"]["quant_method"] = "awq"
    (folder / "config.json").write_text(json.dumps(told))
    with pytest.raises(SourceError, match="quantized by 'awq'"):
        load(folder, torch.float32)


def test_codes_of_another_shape_are_refused(artifact: Callable[..., Path]) -> None:
    folder = artifact("native", INT4)
    file = next(f for f in folder.glob("*.safetensors") if any("codes" in k for k in load_file(f)))
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("weight_codes"))
    tensors[name] = tensors[name][:-1].contiguous()
    save_file(tensors, file)
    with pytest.raises(SourceError, match="whole"):
        load(folder, torch.float32)
