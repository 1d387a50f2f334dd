"""The native format: every scheme, and what compressed-tensors cannot carry."""

import pytest
import torch
from torch import Tensor

from quantcore.affine import choose_qparams, dequantize, quantize
from quantcore.formats import native
from quantcore.formats.base import QuantizedLinear
from quantcore.schemes import SCHEME_KINDS, Scheme, every_form

# groups of one input divide every width
SCHEMES = [scheme for name in SCHEME_KINDS for scheme in every_form(name, [1])]
all_schemes = pytest.mark.parametrize("scheme", SCHEMES, ids=Scheme.label)


def linear(
    scheme: Scheme, rows: int, width: int, factor_I: Tensor | None = None
) -> QuantizedLinear:
    w_OI = torch.randn(rows, width, generator=torch.Generator().manual_seed(rows * width)) + 0.3
    qparams = choose_qparams(w_OI, scheme, stored=torch.bfloat16)
    scale = 0.125 if scheme.static else None
    return QuantizedLinear(quantize(w_OI, qparams, scheme), qparams, scheme, scale, factor_I)


@pytest.mark.parametrize("width", [1, 7, 32, 33])
@pytest.mark.parametrize("rows", [1, 5])
@all_schemes
def test_what_is_stored_reads_back(scheme: Scheme, rows: int, width: int) -> None:
    factor_I = torch.rand(width) + 0.5
    ours = linear(scheme, rows, width, factor_I)
    tensors = native.FORMAT.encode(ours, torch.bfloat16)
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    assert tensors["weight_scale"].dtype == torch.bfloat16
    back = native.read(tensors, scheme, width)
    assert torch.equal(back.codes_OI, ours.codes_OI)
    assert torch.equal(back.qparams.scale_OG, ours.qparams.scale_OG)
    assert torch.equal(back.qparams.zero_OG, ours.qparams.zero_OG)
    assert back.input_scale == ours.input_scale
    assert back.input_factor_I is not None
    assert torch.equal(back.input_factor_I, factor_I)
    w_OI = dequantize(ours.codes_OI, ours.qparams, scheme)
    assert torch.equal(native.FORMAT.decode(tensors, scheme, width), w_OI / factor_I)


def test_every_code_survives() -> None:
    scheme = Scheme(name="int4", group_size=None, zero_point="none")
    codes_OI = torch.arange(-8, 8, dtype=torch.int8).repeat(3, 1)
    qparams = choose_qparams(codes_OI.float(), scheme, stored=torch.float32)
    tensors = native.FORMAT.encode(QuantizedLinear(codes_OI, qparams, scheme), torch.float32)
    assert tensors["weight_codes"].shape == (3, 8)
    assert torch.equal(native.read(tensors, scheme, 16).codes_OI, codes_OI)


def test_the_config_names_each_linears_scheme() -> None:
    schemes = {"b": SCHEMES[0], "a": SCHEMES[-1], "c": SCHEMES[0]}
    config = native.FORMAT.config(schemes, ["lm_head"])
    assert native.schemes_of(config) == schemes
    assert config["skipped"] == ["lm_head"]
    with pytest.raises(ValueError, match="version 1"):
        native.schemes_of({**config, "version": 1})
