"""Schemes beside torchao 0.18: whole linears by its own configs, and activations as served.

    pytest tests/test_torchao_schemes.py      where torchao==0.18.* is installed

test_torchao_agreement.py holds the operators to the bit. Schemes differ from torchao's in one
thing: they divide by the scale, in float32, where its integer quantization multiplies by the
scale's reciprocal, in the weight's dtype. So a weight between two codes, as -max|w| of a symmetric
grid always is, may get the other one, as near; and in bfloat16 ours is the nearer.

Its int4 tensors for tinygemm need a GPU's packing, and its float8 activations a GPU: those are held
against its operators.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

torchao = pytest.importorskip("torchao")

from torchao import quantization as ao  # noqa: E402
from torchao.quantization import quant_primitives as peer  # noqa: E402

from quantcore.activations import fake_quantize  # noqa: E402
from quantcore.affine import Qparams, choose_qparams, dequantize, quantize  # noqa: E402
from quantcore.schemes import Scheme  # noqa: E402

pytestmark = pytest.mark.skipif(
    not torchao.__version__.startswith("0.18."), reason="held against torchao 0.18's conventions"
)

ROWS, WIDTH = 64, 256
SYMMETRIC, ASYMMETRIC = peer.MappingType.SYMMETRIC, peer.MappingType.ASYMMETRIC


def intx(dtype: torch.dtype, granularity: Any, mapping: Any) -> Any:
    return ao.IntxWeightOnlyConfig(
        weight_dtype=dtype, granularity=granularity, mapping_type=mapping
    )


CONFIGS: dict[str, tuple[Callable[[], Any], Scheme]] = {
    "int8": (ao.Int8WeightOnlyConfig, Scheme(name="int8")),
    "int8 g64": (
        lambda: ao.Int8WeightOnlyConfig(granularity=ao.PerGroup(64)),
        Scheme(name="int8", group_size=64),
    ),
    "int8 asym": (
        lambda: intx(torch.int8, ao.PerAxis(0), ASYMMETRIC),
        Scheme(name="int8", zero_point="int"),
    ),
    "int8_dynamic": (ao.Int8DynamicActivationInt8WeightConfig, Scheme(name="int8_dynamic")),
    "int4": (
        lambda: intx(torch.int4, ao.PerAxis(0), SYMMETRIC),
        Scheme(name="int4"),
    ),
    "int4 g32": (
        lambda: intx(torch.int4, ao.PerGroup(32), SYMMETRIC),
        Scheme(name="int4", group_size=32),
    ),
    "int4 asym g64": (
        lambda: intx(torch.int4, ao.PerGroup(64), ASYMMETRIC),
        Scheme(name="int4", group_size=64, zero_point="int"),
    ),
    "int8_dynamic_int4": (
        lambda: ao.Int8DynamicActivationIntxWeightConfig(
            weight_dtype=torch.int4, weight_granularity=ao.PerGroup(32)
        ),
        Scheme(name="int8_dynamic_int4", group_size=32),
    ),
    "float8": (ao.Float8WeightOnlyConfig, Scheme(name="float8")),
}


def weight(dtype: torch.dtype) -> Tensor:
    w_OI = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(5)) * 0.03
    w_OI[3, 5] = 0.5
    return w_OI.to(dtype)


def by_torchao(config: Any, w_OI: Tensor) -> Any:
    linear = nn.Linear(WIDTH, ROWS, bias=False).to(w_OI.dtype)
    linear.weight.data.copy_(w_OI)
    model = nn.Sequential(linear)
    ao.quantize_(model, config)
    return model[0].weight


@pytest.mark.parametrize("name", CONFIGS)
def test_float32_linears(name: str) -> None:
    """Scales and zero points to the bit; codes too, but for what lies between two of them."""
    config, scheme = CONFIGS[name]
    w_OI = weight(torch.float32)
    theirs = by_torchao(config(), w_OI)
    ours = choose_qparams(w_OI, scheme, stored=torch.float32)
    assert torch.equal(ours.scale_OG, theirs.scale.reshape(ours.scale_OG.shape))
    if not scheme.symmetric:
        assert torch.equal(ours.zero_OG.int(), theirs.zero_point.int())
    codes_OI, their_codes_OI = quantize(w_OI, ours, scheme), theirs.qdata.view(torch.int8)
    other_OI = codes_OI != their_codes_OI
    assert other_OI.float().mean() < 0.005
    values_OI, their_values_OI = dequantize(codes_OI, ours, scheme), theirs.dequantize()
    assert torch.equal(values_OI[~other_OI], their_values_OI[~other_OI])
    off_OI, their_off_OI = (w_OI - values_OI).abs(), (w_OI - their_values_OI).abs()
    assert ((off_OI - their_off_OI).abs() <= 2**-22 * w_OI.abs()).all()  # a quotient's rounding


@pytest.mark.parametrize("name", CONFIGS)
def test_bfloat16_linears(name: str) -> None:
    """Asymmetric scales within two steps of bfloat16, as its arithmetic there rounds twice."""
    config, scheme = CONFIGS[name]
    w_OI = weight(torch.bfloat16)
    theirs = by_torchao(config(), w_OI)
    ours = choose_qparams(w_OI, scheme, stored=torch.bfloat16)
    scale_OG = theirs.scale.float().reshape(ours.scale_OG.shape)
    apart = (ours.scale_OG / scale_OG - 1).abs().max()
    assert apart == 0 if scheme.symmetric else apart <= 2**-7
    codes_OI, their_codes_OI = quantize(w_OI, ours, scheme), theirs.qdata.view(torch.int8)
    if scheme.symmetric:
        same_OI = codes_OI == their_codes_OI
        assert same_OI.float().mean() > 0.98
        values_OI = dequantize(codes_OI, ours, scheme).bfloat16()
        assert torch.equal(values_OI[same_OI], theirs.dequantize()[same_OI])
    their_zero_OG = torch.zeros_like(ours.zero_OG) if scheme.symmetric else theirs.zero_point
    their_grid = Qparams(scale_OG, their_zero_OG)
    ours_OI = dequantize(codes_OI, ours, scheme)
    theirs_OI = dequantize(their_codes_OI, their_grid, scheme)
    assert (w_OI.float() - ours_OI).norm() <= (w_OI.float() - theirs_OI).norm()


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_int4_with_float_zero_points(group_size: int, dtype: torch.dtype) -> None:
    """tinygemm's numbers, (q - 8) s + z with q from 0 to 15; ours are q s + z from -8 to 7."""
    scheme, block = Scheme(name="int4", group_size=group_size, zero_point="float"), (1, group_size)
    w_OI = weight(dtype)
    scale, zero = peer._choose_qparams_affine_tinygemm(
        w_OI,
        ASYMMETRIC,
        block,
        torch.int32,
        0,
        15,
        eps=1e-6,
        scale_dtype=dtype,
        zero_point_dtype=dtype,
    )
    codes_OI = peer._quantize_affine_tinygemm(w_OI, block, scale, zero, torch.int32, 0, 15) - 8
    values_OI = peer._dequantize_affine_tinygemm(
        codes_OI + 8, block, scale, zero, torch.int32, 0, 15, output_dtype=dtype
    )
    ours = choose_qparams(w_OI, scheme, stored=dtype)
    ours_OI = quantize(w_OI, ours, scheme)
    shape = ours.scale_OG.shape
    step = torch.finfo(dtype).eps
    largest = w_OI.float().abs().max()
    torch.testing.assert_close(ours.scale_OG, scale.float().reshape(shape), rtol=2 * step, atol=0.0)
    torch.testing.assert_close(
        ours.zero_OG, zero.float().reshape(shape), rtol=0.0, atol=2 * step * largest
    )
    error = (w_OI.float() - dequantize(ours_OI, ours, scheme)).norm()
    assert error <= 1.001 * (w_OI.float() - values_OI.float()).norm()
    if dtype == torch.float32:
        assert (ours_OI == codes_OI).float().mean() > 0.995
        assert (ours_OI - codes_OI).abs().max() <= 1


TOKENS = torch.randn(48, WIDTH, generator=torch.Generator().manual_seed(6)) * 3


def served(mapping: Any, x_TI: Tensor) -> Tensor:
    """Each token by torchao's integer operators."""
    block = (1, x_TI.shape[1])
    scale, zero = peer.choose_qparams_affine(
        x_TI, mapping, block, torch.int8, scale_dtype=torch.float32, keepdim=True
    )
    codes = peer.quantize_affine(x_TI, block, scale, zero, torch.int8)
    return peer.dequantize_affine(codes, block, scale, zero, torch.int8)


@pytest.mark.parametrize(
    ("scheme", "mapping"),
    [
        (Scheme(name="int8_dynamic"), SYMMETRIC),
        (Scheme(name="int8_dynamic_int4", group_size=32), ASYMMETRIC),
    ],
    ids=["int8_dynamic", "int8_dynamic_int4"],
)
def test_activations_to_int8_by_token(scheme: Scheme, mapping: Any) -> None:
    ours_TI, theirs_TI = fake_quantize(TOKENS, scheme), served(mapping, TOKENS)
    same_TI = ours_TI == theirs_TI
    assert same_TI.float().mean() > 0.995
    off_TI, their_off_TI = (TOKENS - ours_TI).abs(), (TOKENS - theirs_TI).abs()
    # the others lie between two codes
    torch.testing.assert_close(off_TI, their_off_TI, rtol=1e-3, atol=0.0)


@pytest.mark.parametrize("per_tensor", [False, True], ids=["row", "tensor"])
def test_activations_to_float8(per_tensor: bool) -> None:
    scheme = Scheme(name="float8_dynamic", per_tensor=per_tensor)
    block = list(TOKENS.shape) if per_tensor else [1, WIDTH]
    scale = peer._choose_scale_float8(TOKENS, block)
    codes = peer._quantize_affine_float8(TOKENS, scale)
    theirs_TI = peer._dequantize_affine_float8(codes, scale, torch.float32)
    assert torch.equal(fake_quantize(TOKENS, scheme), theirs_TI)


def test_float8_weights_with_one_scale() -> None:
    scheme, w_OI = Scheme(name="float8", per_tensor=True), weight(torch.float32)
    scale = peer._choose_scale_float8(w_OI, [ROWS, WIDTH])
    codes = peer._quantize_affine_float8(w_OI, scale)
    ours = choose_qparams(w_OI, scheme, stored=torch.float32)
    assert (ours.scale_OG == scale.item()).all()
    assert torch.equal(quantize(w_OI, ours, scheme), codes.view(torch.int8))
    theirs_OI = peer._dequantize_affine_float8(codes, scale, torch.float32)
    assert torch.equal(dequantize(codes.view(torch.int8), ours, scheme), theirs_OI)
