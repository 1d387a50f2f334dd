"""Activations to codes: the references against float64, the kernels against those, bit for bit."""

import numpy as np
import pytest
import torch
from quantkernels import rounding
from quantkernels.rounding import InputGrid, operators, reference
from torch import Tensor

from tests.references import float8_values
from tests.roundings import (
    DEVICE,
    DTYPES,
    GRIDS,
    HALVES,
    HAS_TRITON,
    INF,
    NAN,
    ON_GPU,
    SHAPES,
    Codes,
    kernels,
    of_all_signs,
    on_nan,
    random,
    same,
)

SYMMETRIC = [grid for grid in GRIDS.values() if grid.symmetric]

grids = pytest.mark.parametrize("grid", GRIDS.values(), ids=list(GRIDS))
symmetric = pytest.mark.parametrize("grid", SYMMETRIC, ids=str)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
pytestmark = on_nan
if HAS_TRITON:
    import triton
    import triton.language as tl
    from quantkernels.forward import fused as fused_forward
    from quantkernels.nearest import quotient
    from quantkernels.rounding import fused

    @triton.jit
    def quotients(x_ptr, by_ptr, out_ptr):
        at = tl.program_id(0) * 1024 + tl.arange(0, 1024)
        tl.store(out_ptr + at, quotient(tl.load(x_ptr + at), tl.load(by_ptr), True))


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel forgets to write is found."""

    def outputs(x_TI: Tensor, spans: tuple[int, ...]) -> Codes:
        codes_TI, scale, zero = operators.outputs(x_TI, spans)
        return codes_TI.fill_(0x55), scale.fill_(-77.0), zero.fill_(-77.0)

    monkeypatch.setattr(fused, "outputs", outputs)
    monkeypatch.setattr(fused, "kept", lambda x_TI, keep: operators.kept(x_TI, keep).fill_(NAN))


def in_float64(x: Tensor, grid: InputGrid, whole: bool) -> tuple[np.ndarray, np.ndarray]:
    """Scale and zero point, by the formulas."""
    x_TI = x.double().cpu().numpy()
    axis = None if whole else -1
    low, high = x_TI.min(axis=axis, keepdims=True), x_TI.max(axis=axis, keepdims=True)
    if grid.symmetric:
        scale = np.maximum(np.abs(low), np.abs(high)) / ((grid.qmax - grid.qmin) / 2)
        return np.where(scale > 0, scale, 1), np.zeros_like(scale)
    low, high = np.minimum(low, 0), np.maximum(high, 0)
    scale = np.where(high > low, (high - low) / (grid.qmax - grid.qmin), 1)
    return scale, np.clip(np.rint(grid.qmin - low / scale), grid.qmin, grid.qmax)


def off_nearest(x: Tensor, found: Codes, grid: InputGrid) -> float:
    """How much farther than the nearest value of its grid a code's may be, in steps."""
    codes, scale, zero = (part.cpu().numpy() for part in found)
    steps = x.double().cpu().numpy() / scale
    if grid.name == "float8":
        values, bits = float8_values()
        table = dict(zip(bits.tolist(), values.tolist(), strict=True))
        coded = np.vectorize(table.__getitem__, otypes=[np.float64])(codes.astype(int))
    else:
        values = np.arange(grid.qmin, grid.qmax + 1, dtype=np.float64)
        steps, coded = steps + zero, codes.astype(np.float64)
    least = np.abs(steps[..., None] - values).min(axis=-1)
    return float((np.abs(steps - coded) - least).max())


@grids
@dtypes
@pytest.mark.parametrize("whole", [False, True])
def test_scales_and_codes_are_what_the_formulas_say(
    grid: InputGrid, dtype: torch.dtype, whole: bool
) -> None:
    x = random(2, 5, 48, dtype=dtype)
    x[0, 0], x[0, 1], x[0, 2] = 0.0, x[0, 1].abs(), -x[0, 2].abs()
    found = (reference.by_tensor if whole else reference.by_token)(x, grid)
    scale, zero = in_float64(x, grid, whole)
    assert np.allclose(found[1].cpu().numpy(), scale.reshape(found[1].shape), rtol=3e-7, atol=0)
    assert np.array_equal(found[2].cpu().numpy(), zero.reshape(found[2].shape))
    assert off_nearest(x, found, grid) < 1e-4


@symmetric
def test_a_given_scale_is_taken_as_it_is(grid: InputGrid) -> None:
    x, scale = random(4, 48), torch.tensor([0.75], dtype=torch.bfloat16, device=DEVICE)
    found = reference.by_scale(x, scale, grid)
    assert found[1].tolist() == 0.75 and found[1].dtype == torch.float32
    assert off_nearest(x, found, grid) < 1e-6


def test_ties_go_to_even_and_ends_hold() -> None:
    one = torch.ones((), device=DEVICE)
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 126.5, 127.5, 1e30, INF, -128.5, -1e30, -INF, NAN])
    found = rounding.by_scale(x.to(DEVICE), one, GRIDS["int8"])[0]
    assert found.tolist() == [0, 2, 2, 0, -2, 126, 127, 127, 127, -128, -128, -128, 0]
    x = torch.tensor([17.0, 19.0, 447.0, 1e30, INF, -INF, -1e-9, 2**-10, 3 * 2**-10, NAN])
    found = rounding.by_scale(x.to(DEVICE), one, GRIDS["float8"])[0]
    wanted = [16.0, 20.0, 448.0, 448.0, 448.0, -448.0, -0.0, 0.0, 2**-8]
    values = found.view(torch.float8_e4m3fn).float().tolist()
    assert values[:-1] == wanted and values[-1] != values[-1]
    assert found[6] == -128  # a zero with its sign


@grids
@pytest.mark.parametrize("whole", [False, True])
def test_what_is_not_finite_is_not_lost(grid: InputGrid, whole: bool) -> None:
    for poison in (NAN, INF, -INF):
        x_TI = random(3, 40)
        clean_TI = x_TI.clone()
        x_TI[1, 7] = poison
        codes_TI, scale, zero = (rounding.by_tensor if whole else rounding.by_token)(x_TI, grid)
        values_TI = (codes_TI.float() - zero) * scale
        assert not values_TI[1].isfinite().any()
        if whole:
            assert not values_TI.isfinite().any()
        else:
            kept = [0, 2]
            wanted = rounding.by_token(clean_TI, grid)
            assert torch.equal(codes_TI[kept], wanted[0][kept])
            assert torch.equal(scale[kept], wanted[1][kept])


@kernels
@symmetric
def test_the_largest_and_the_least_floats_have_scales(grid: InputGrid) -> None:
    """Of what is finite a scale is, and twice as much over all the steps, where there is such."""
    facts = torch.finfo(torch.float32)
    largest_T = torch.tensor([facts.max, facts.max / 2, 3.7, facts.tiny * 300], device=DEVICE)
    x_TI = random(4, 40).clamp(-1, 1) * largest_T[:, None]
    x_TI[:, 5] = largest_T
    doubled_T = largest_T.cpu() * 2 / torch.full((4,), float(grid.qmax - grid.qmin))
    for run in (reference, fused):
        codes_TI, scale_T1, _ = run.by_token(x_TI, grid)
        assert scale_T1.isfinite().all()
        assert torch.equal(scale_T1[1:, 0].cpu(), doubled_T[1:])
        top = codes_TI.view(torch.uint8 if grid.name == "float8" else torch.int8)[:, 5]
        assert top.tolist() == [0x7E if grid.name == "float8" else grid.qmax] * 4


@kernels
@grids
@dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("poisoned")
def test_the_kernels_are_their_references(
    grid: InputGrid, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    x = of_all_signs(random(*shape, dtype=dtype))
    assert same(fused.by_token(x, grid), reference.by_token(x, grid), grid)
    assert same(fused.by_tensor(x, grid), reference.by_tensor(x, grid), grid)
    if grid.symmetric:
        scale = torch.tensor(0.0123, device=DEVICE, dtype=dtype)
        assert same(fused.by_scale(x, scale, grid), reference.by_scale(x, scale, grid), grid)


@kernels
@grids
@pytest.mark.parametrize(("held", "span"), [(32, 512), (32, 16), (256, 64), (256, 16)])
@pytest.mark.usefixtures("poisoned")
def test_rows_too_wide_to_be_held_and_rows_that_programs_share(
    grid: InputGrid, held: int, span: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused, "KEPT", held)
    sizes = {"HELD": held, "READ": 64, "SEEN": 64, "LEAST_SPAN": span}
    for name, value in sizes.items():
        monkeypatch.setattr(fused, name, value)
    monkeypatch.setattr(fused, "PARTS", 7)
    x_TI = random(5, 150)
    x_TI[1, 100], x_TI[2, 149], x_TI[3] = NAN, INF, 0.0
    for rows_TI in (x_TI, x_TI[3:]):
        assert same(fused.by_token(rows_TI, grid), reference.by_token(rows_TI, grid), grid)
        assert same(fused.by_tensor(rows_TI, grid), reference.by_tensor(rows_TI, grid), grid)


@kernels
@grids
@pytest.mark.usefixtures("poisoned")
def test_kernels_round_bits_of_any_kind_as_the_references(grid: InputGrid) -> None:
    """Subnormals, what overflows, infinities, NaN: random bits, in a row of like size or not."""
    generator = torch.Generator().manual_seed(1)
    count = 200_000 if ON_GPU else 100
    bits_TI = torch.randint(-(2**31), 2**31, (count, 8), generator=generator, dtype=torch.int64)
    far_TI = bits_TI.int().view(torch.float32)
    exponent_T1 = torch.randint(0, 256, (count, 1), generator=generator, dtype=torch.int64) << 23
    near_TI = (bits_TI & ~(0xFF << 23) | exponent_T1).int().view(torch.float32)
    for x_TI in (far_TI.to(DEVICE), near_TI.to(DEVICE)):
        assert same(fused.by_token(x_TI, grid), reference.by_token(x_TI, grid), grid)
    for x_T8 in near_TI[:10].to(DEVICE):
        x_T4 = x_T8.view(2, 4)
        assert same(fused.by_tensor(x_T4, grid), reference.by_tensor(x_T4, grid), grid)


@pytest.mark.gpu
@pytest.mark.parametrize("by", [1.0, 1 / 3, 7.3e-17, 1.9e17, 1e-30, 1e30, 0.0, float("inf")])
def test_quotients_are_rounded_once(by: float) -> None:
    """But for those that are 0 or an end of the grid to any code."""
    generator = torch.Generator().manual_seed(2)
    bits_I = torch.randint(-(2**31), 2**31, (1 << 22,), generator=generator, dtype=torch.int64)
    x_I = bits_I.int().view(torch.float32).to(DEVICE)
    divisor = torch.tensor([by], device=DEVICE)
    for scaled in (1.0, 1.1, 1.7):
        found_I = torch.empty_like(x_I)
        quotients[(len(x_I) // 1024,)](x_I, divisor * scaled, found_I)
        wanted_I = (x_I.cpu() / (divisor * scaled).cpu()).to(DEVICE)
        number_I = ~wanted_I.isnan()
        assert torch.equal(found_I.isnan(), ~number_I)
        found_I, wanted_I = found_I[number_I], wanted_I[number_I]
        assert torch.equal(found_I.signbit(), wanted_I.signbit())
        tiny_I, huge_I = wanted_I.abs() < 2.0**-30, wanted_I.abs() > 2.0**120
        rest_I = ~(tiny_I | huge_I)
        assert torch.equal(found_I[rest_I], wanted_I[rest_I])
        assert (found_I[tiny_I].abs() < 2.0**-29).all()
        assert (found_I[huge_I].abs() > 2.0**119).all()


@kernels
@symmetric
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_half_is_rounded_as_the_reference_rounds_it(
    grid: InputGrid, dtype: torch.dtype
) -> None:
    x_TI = torch.arange(65_536).to(torch.int16).view(dtype).view(8, 8192).to(DEVICE)
    for value in (1.0, 0.1, 3e-5, 1e-42, 700.0):
        scale = torch.tensor(value, device=DEVICE)
        assert same(fused.by_scale(x_TI, scale, grid), reference.by_scale(x_TI, scale, grid), grid)


@kernels
@grids
@pytest.mark.usefixtures("poisoned")
def test_any_strides_and_no_tokens(grid: InputGrid) -> None:
    wide_TI = random(12, 60)
    for x_TI in (
        wide_TI[:, ::2],
        wide_TI[::3, 11:],
        wide_TI.t(),
        wide_TI[:1].expand(7, 60),
        wide_TI.view(3, 4, 60).transpose(0, 1),
        wide_TI[:0],
        wide_TI[0],
    ):
        before = x_TI.clone()
        found = [fused.by_token(x_TI, grid), fused.by_tensor(x_TI, grid)]
        wanted = [reference.by_token(before, grid), reference.by_tensor(before, grid)]
        if grid.symmetric:
            scale = torch.tensor([[0.1]], device=DEVICE)
            found.append(fused.by_scale(x_TI, scale, grid))
            wanted.append(reference.by_scale(before, scale, grid))
        for ours, theirs in zip(found, wanted, strict=True):
            assert same(ours, theirs, grid)
            assert ours[0].is_contiguous()
        assert torch.equal(x_TI, before)


def close(found: Tensor, wanted: Tensor) -> bool:
    ulps = 16 if found.dtype == torch.float32 else 2
    step = torch.finfo(found.dtype).eps * wanted.double().abs()
    return bool(((found.double() - wanted.double()).abs() <= ulps * step + 1e-7).all())


@kernels
@grids
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("form", ["scale", "offset"])
@pytest.mark.usefixtures("poisoned")
def test_a_norm_and_its_rounding_in_one(grid: InputGrid, dtype: torch.dtype, form: str) -> None:
    for shape in ((3, 1), (2, 3, 70), (0, 24), *(((4, 32_768),) if ON_GPU else ())):
        x, weight_I = random(*shape, dtype=dtype), random(shape[-1], dtype=dtype, seed=1)
        for given in [None, torch.tensor(0.05, device=DEVICE)][: 1 + grid.symmetric]:
            *found, normed = fused.norm(x, weight_I, 1e-5, form, given, True, grid)
            *wanted, exact = reference.norm(x, weight_I, 1e-5, form, given, grid)
            assert normed.dtype == dtype and close(normed, exact)
            if given is None:
                rounded = reference.by_token(normed, grid)
            else:
                rounded = reference.by_scale(normed, given, grid)
            assert same((found[0], found[1], found[2]), rounded, grid)
            assert [part.shape for part in found] == [part.shape for part in wanted]
            *again, nothing = fused.norm(x, weight_I, 1e-5, form, given, False, grid)
            assert same((again[0], again[1], again[2]), rounded, grid)
            assert nothing.shape == (0, shape[-1])


@kernels
def test_a_norm_too_wide_to_be_held_and_one_of_any_strides(monkeypatch: pytest.MonkeyPatch) -> None:
    grid, weight_I = GRIDS["int8"], random(120, seed=1)[::2]
    x_TI = random(60, 9).t()
    wanted = reference.norm(x_TI, weight_I, 1e-5, "scale", None, grid)
    for held in (64, 32):
        monkeypatch.setattr(fused, "HELD", held)
        codes_TI, scale_T1, zero_T1, normed_TI = fused.norm(
            x_TI, weight_I, 1e-5, "scale", None, True, grid
        )
        assert close(normed_TI, wanted[3])
        rounded = reference.by_token(normed_TI, grid)
        assert same((codes_TI, scale_T1, zero_T1), rounded, grid)


@kernels
def test_the_entry_point_keeps_a_norms_values_if_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    x_TI, weight_I, grid = random(3, 16), random(16, seed=1), GRIDS["float8"]
    for devices in (("cuda", "xpu"), (DEVICE,)):
        monkeypatch.setattr(rounding, "FUSED_DEVICES", devices)
        assert rounding.norm(x_TI, weight_I, 1e-5, "scale", grid)[3] is None
        *_, normed_TI = rounding.norm(x_TI, weight_I, 1e-5, "scale", grid, keep=True)
        assert normed_TI is not None
        assert close(normed_TI, fused_forward.rms_norm(x_TI, weight_I, 1e-5, "scale"))


@kernels
@pytest.mark.parametrize("tokens", [0, 3])
def test_operators_keep_torchs_rules(tokens: int) -> None:
    """No result shares memory with an argument, and none has another shape than was promised."""
    x_TI, weight_I, fields = random(40, tokens).t(), random(40), GRIDS["int8"].fields
    scale = torch.tensor([0.1], device=DEVICE)
    tests = ("test_schema", "test_faketensor")
    for operator, args in (
        (operators.by_token, (x_TI, *fields)),
        (operators.by_tensor, (x_TI, *fields)),
        (operators.by_scale, (x_TI, scale, *fields)),
        (operators.norm, (x_TI, weight_I, 1e-5, "scale", None, True, *fields)),
        (operators.norm, (x_TI, weight_I, 1e-5, "scale", scale, False, *fields)),
    ):
        torch.library.opcheck(operator, args, test_utils=tests)
