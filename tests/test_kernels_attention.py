"""Attention of one token over a cache, the kernel and the reference, against float64.

On a machine with a GPU the kernel runs on it (`pytest -m gpu`); elsewhere in Triton's interpreter,
where bfloat16 is computed in float32.
"""

import importlib.util
from typing import Literal

import pytest
import torch
from quantkernels.forward import attended, attends, reference
from torch import Tensor

ON_GPU = torch.cuda.is_available()
HAS_TRITON = importlib.util.find_spec("triton") is not None
DEVICE = "cuda" if ON_GPU else "cpu"
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# the interpreter takes seconds for each, and knows no bfloat16
TAKEN = DTYPES if ON_GPU else [pytest.param(DTYPES[1], marks=pytest.mark.slow), DTYPES[2]]
Kind = Literal["kept", "added", "none"]
KINDS: list[Kind] = ["kept", "added", "none"]
# sequences, query heads, heads of keys, places, of which the first are filled, values of a head
SHAPES = [
    (1, 32, 8, 230, 131, 128),
    (2, 4, 4, 33, 33, 64),
    (3, 7, 1, 77, 5, 80),
    (2, 14, 2, 600, 300, 64),
    (1, 8, 2, 1, 1, 96),
    *([(1, 32, 8, 8192, 5000, 128), (16, 32, 8, 260, 259, 128)] if ON_GPU else []),
]

kernels = (
    pytest.mark.gpu
    if ON_GPU
    else pytest.mark.skipif(not HAS_TRITON, reason="needs triton (3.9 or newer without a GPU)")
)
if HAS_TRITON:
    from quantkernels.forward import attention

Inputs = tuple[Tensor, Tensor, Tensor, Tensor | None]


def inputs(shape: tuple[int, ...], kind: Kind, dtype: torch.dtype, places: int = 0) -> Inputs:
    """As transformers hands them over; what the mask excludes is NaN. Without one, all counts."""
    sequences, heads, groups, length, filled, values = shape
    generator = torch.Generator().manual_seed(length)

    def random(*of: int) -> Tensor:
        return torch.randn(*of, generator=generator).to(DEVICE, dtype)

    q = random(sequences, 1, heads, values).transpose(1, 2)
    k, v = random(2, sequences, groups, length + places, values)[:, :, :, :length]
    if kind == "none":
        return q, k, v, None
    counts = (torch.arange(length, device=DEVICE) < filled).expand(sequences, 1, 1, length).clone()
    counts[-1, :, :, : filled // 3] = False  # as one that is padded on its left
    excluded = ~counts[:, 0, 0, :, None][:, None].expand(k.shape)
    k[excluded], v[excluded] = torch.nan, torch.nan
    if kind == "kept":
        return q, k, v, counts
    return q, k, v, random(*counts.shape).masked_fill(~counts, -torch.inf)


def in_float64(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """One sequence and query head after the other, of the places that count alone."""
    out = torch.zeros(len(q), 1, q.shape[1], q.shape[3], dtype=torch.float64, device=q.device)
    for sequence in range(len(q)):
        one = None if mask is None else mask[min(sequence, len(mask) - 1), 0, 0]
        if one is None:
            counts = torch.ones(k.shape[2], dtype=torch.bool, device=q.device)
        else:
            counts = one if one.dtype == torch.bool else one > -torch.inf
        for head in range(q.shape[1]):
            group = head // (q.shape[1] // k.shape[1])
            keys, values = (x[sequence, group, counts].double() for x in (k, v))
            s = keys @ q[sequence, head, 0].double() * scale
            if one is not None and one.dtype != torch.bool:
                s = s + one[counts].double()
            if len(s):
                out[sequence, 0, head] = s.softmax(-1) @ values
    return out


def close(found: Tensor, wanted: Tensor) -> bool:
    """Head by head: matrix units take weights that are rounded once more."""
    off = (found.double() - wanted).norm(dim=-1)
    near = max(2 * torch.finfo(found.dtype).eps, 1e-5)
    return found.isfinite().all().item() and bool((off <= near * wanted.norm(dim=-1)).all())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_reference_is_what_the_formula_says(shape: tuple[int, ...], kind: Kind) -> None:
    of = inputs(shape, kind, torch.float32)
    assert close(reference.attended(*of, 0.2), in_float64(*of, 0.2))
    assert attends(*of)


@kernels
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", TAKEN, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_kernel_is_too_and_gives_the_same_bits_again(
    shape: tuple[int, ...], kind: Kind, dtype: torch.dtype
) -> None:
    of = inputs(shape, kind, dtype)
    found = attention.attended(*of, 0.2)
    assert (found.dtype, found.is_contiguous()) == (dtype, True)
    assert close(found, in_float64(*of, 0.2))
    for _ in range(20 if ON_GPU else 1):
        assert torch.equal(attention.attended(*of, 0.2), found)


@kernels
@pytest.mark.parametrize("look", [0, 1 << 20])
@pytest.mark.parametrize("programs", [1, 24, 64, 1024])
def test_spans_may_be_one_or_many_and_looked_at_first_or_not(
    programs: int, look: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = (2, 6, 2, 421, 300, 48)
    monkeypatch.setattr(attention, "PROGRAMS", programs)
    monkeypatch.setattr(attention, "SHORT", look)
    for kind in KINDS:
        of = inputs(shape, kind, torch.float16)
        assert close(attention.attended(*of, 0.1), in_float64(*of, 0.1))
    spans, span = attention.spans_of(4, 421)
    assert (spans, spans * span >= 421 > (spans - 1) * span) == (
        {1: 1, 24: 5, 64: 14}.get(programs, 14),
        True,
    )


@kernels
def test_strides_are_any_and_one_mask_does_for_all() -> None:
    q, k, v, mask = inputs((2, 6, 2, 100, 60, 64), "kept", torch.float16, places=7)
    assert mask is not None
    mask = mask[1:]  # of the two sequences, the one with fewer places
    wanted = attention.attended(q, k, v, mask, 0.1)
    assert close(wanted, in_float64(q, k, v, mask, 0.1))
    by_place = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v)]
    assert torch.equal(attention.attended(q.contiguous(), *by_place, mask, 0.1), wanted)
    spread = [torch.stack((x, x), -1).flatten(-2)[..., ::2] for x in (q, k, v)]
    apart = torch.stack((mask, ~mask), -1).flatten(-2)[..., ::2].expand(2, 1, 1, 100)
    assert torch.equal(attention.attended(*spread, apart, 0.1), wanted)


@kernels
@pytest.mark.parametrize("length", [20, 100, 700])
def test_what_has_no_place_to_look_at_is_zero(length: int) -> None:
    q, k, v, _ = inputs((2, 4, 2, length, length, 64), "none", torch.float16)
    mask = torch.zeros(2, 1, 1, length, dtype=torch.bool, device=DEVICE)
    mask[1, ..., length // 2] = True
    added = torch.zeros(mask.shape, device=DEVICE).masked_fill(~mask, -torch.inf)
    for given in (mask, added):
        for found in (
            attention.attended(q, k, v, given, 0.1),
            reference.attended(q, k, v, given, 0.1),
        ):
            assert not found[0].any()
            assert torch.equal(found[1, 0], v[1, :, length // 2].repeat_interleave(2, 0))


@kernels
def test_a_nan_in_a_place_that_counts_shows_in_its_heads_alone() -> None:
    q, k, v, _ = inputs((1, 4, 2, 70, 70, 64), "none", torch.float16)
    k[0, 1, 40, 3] = torch.nan
    found = attention.attended(q, k, v, None, 0.1)
    assert found[0, 0, 2:].isnan().all() and found[0, 0, :2].isfinite().all()


@kernels
def test_scores_far_apart_do_not_overflow() -> None:
    q, k, v, _ = inputs((1, 4, 2, 70, 70, 64), "none", torch.float16)
    q, k = 60 * q, 60 * k
    k[:, :, 50] = 0
    assert close(attention.attended(q, k, v, None, 1.0), in_float64(q, k, v, None, 1.0))
    least = torch.full((1, 1, 1, 70), torch.finfo(torch.float16).min, device=DEVICE).half()
    least[..., 30] = 0
    assert close(attention.attended(q, k, v, least, 0.0), in_float64(q, k, v, least, 0.0))


def test_what_is_not_one_token_over_a_cache_is_not_taken() -> None:
    q, k, v, mask = inputs((2, 6, 2, 40, 20, 32), "kept", torch.float16)
    assert mask is not None
    assert attends(q, k, v, mask) and attends(q, k, v, None)
    two = q.expand(2, 6, 2, 32)
    others: list[Inputs] = [
        (two, k, v, mask),
        (q[:, :5], k, v, mask),
        (q, k, v[..., :16], mask),
        (q, k, v.float(), mask),
        (q.double(), k.double(), v.double(), mask),
        (q, k, v, mask.expand(2, 6, 1, 40)),
        (q, k, v, mask[..., :39]),
        (q, k, v, mask.long()),
        (q, k, v, mask[:, 0]),
        (q[:1], k, v, mask),
        (q.repeat(1, 1, 1, 16), k.repeat(1, 1, 1, 16), v.repeat(1, 1, 1, 16), mask),
        (q, k[:, :, :0], v[:, :, :0], None),
    ]
    for of in others:
        assert not attends(*of)
    with pytest.raises(AssertionError):
        attended(two, k, v, mask, 1.0)
