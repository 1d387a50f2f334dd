"""Attention of one new token a sequence over a cache, split over its places: one launch.

A program has all query heads of a head of keys over a span of places, in blocks, by an online
softmax (Milakov & Gimelshein 2018, https://arxiv.org/abs/1805.02867, algorithm 3):

    top' = max(top, max s)    sums' = sums e^(top - top') + e^(s - top') V    total' likewise

Its top, total and sums go to memory in float32, and the last program of a head of keys to arrive
merges all of them by the same formula, in the order of the cache ("flash decoding", Dao et al.
2023, https://crfm.stanford.edu/2023/10/12/flashdecoding.html). So results never hang on who comes
last. A short cache is a matter of latency: all that a program reads it asks for at once. Of a long
one each program looks at its span's mask first, and reads from the first place to the last one
that it leaves.

Shape suffixes: B = sequences, H = query heads, G = heads of keys, T = 1, L = places, D = values of
a head.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantkernels.arrivals import arrivals
from quantkernels.dependent import later_than_few, release, wait

PROGRAMS = 256  # of a launch, about, where the cache is long enough
MOST_SPANS = 32  # of a head: one program merges them
FEWEST_PLACES = 32  # of a span
MOST_PLACES = 64  # of a block
MOST_BYTES = 16384  # of a block's keys
SHORT = 512  # places of a cache all of which are read, whatever the mask leaves
MERGED_VALUES = 4096  # at once, of all spans
LEAST_HEADS = 16  # that a matrix unit multiplies

_LOG2_E = tl.constexpr(1.4426950408889634)


def attended(
    q_BHTD: Tensor, k_BGLD: Tensor, v_BGLD: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    if q_BHTD.device.type == "cpu" and q_BHTD.dtype == torch.bfloat16:
        # Triton's interpreter multiplies bfloat16 wrongly, and truncates what it stores
        mask = mask.float() if mask is not None and mask.dtype != torch.bool else mask
        wide = attended(q_BHTD.float(), k_BGLD.float(), v_BGLD.float(), mask, scale)
        return wide.to(q_BHTD.dtype)
    sequences, heads, _, values = q_BHTD.shape
    groups, length = k_BGLD.shape[1:3]
    out_BTHD = torch.empty(sequences, 1, heads, values, dtype=q_BHTD.dtype, device=q_BHTD.device)
    if not out_BTHD.numel():
        return out_BTHD
    pairs = sequences * groups
    spans, span = spans_of(pairs, length)
    mask_BL, kind = _mask(mask, sequences, length)
    parts = counters = out_BTHD
    if spans > 1:
        count = pairs * spans * (heads // groups)
        parts = torch.empty(count * (values + 2), dtype=torch.float32, device=q_BHTD.device)
        counters = arrivals(q_BHTD.device, pairs)
    _attended[(spans, pairs)](
        q_BHTD,
        k_BGLD,
        v_BGLD,
        q_BHTD if mask_BL is None else mask_BL,
        out_BTHD,
        parts,
        counters,
        scale,
        heads // groups,
        groups,
        values,
        length,
        span,
        q_BHTD.stride(0),
        q_BHTD.stride(1),
        q_BHTD.stride(3),
        *k_BGLD.stride(),
        *v_BGLD.stride(),
        *((0, 0) if mask_BL is None else mask_BL.stride()),
        MASK=kind,
        SPLIT=spans > 1,
        **sizes(heads // groups, values, length, (spans, span), q_BHTD.element_size()),
        **later_than_few(q_BHTD.device, spans, pairs),
    )
    return out_BTHD


def spans_of(pairs: int, length: int) -> tuple[int, int]:
    """How many spans each head of keys of each sequence has, and of how many places."""
    pieces = max(1, triton.cdiv(length, FEWEST_PLACES))
    spans = max(1, min(pieces, MOST_SPANS, PROGRAMS // pairs))
    span = triton.cdiv(pieces, spans) * FEWEST_PLACES
    return max(1, triton.cdiv(length, span)), span


def sizes(
    share: int, values: int, length: int, cut: tuple[int, int], num_bytes: int
) -> dict[str, Any]:
    """What a launch is compiled for; `share` query heads have one head of keys."""
    spans, span = map(triton.next_power_of_2, cut)
    tall = max(LEAST_HEADS, triton.next_power_of_2(share))
    heads, wide = triton.next_power_of_2(share), max(16, triton.next_power_of_2(values))
    look = length > SHORT
    return {
        "LOOK": span if look else 0,
        "HEADS": heads,
        "TALL": tall,
        "VALUES": wide,
        "BLOCK": max(16, min(MOST_PLACES, span, MOST_BYTES // (wide * num_bytes))),
        "MERGED": max(1, min(spans, MERGED_VALUES // (heads * wide))),
        "num_warps": 8 if tall * wide * num_bytes > 8192 else 4,
        "num_stages": 2 if look else 1,
    }


def _mask(mask: Tensor | None, sequences: int, length: int) -> tuple[Tensor | None, str]:
    if mask is None:
        return None, "none"
    kind = "kept" if mask.dtype == torch.bool else "added"
    mask_BL = mask[:, 0, 0].expand(sequences, length)
    return (mask_BL.view(torch.uint8) if kind == "kept" else mask_BL), kind


@triton.jit
def _attended(
    q_ptr,
    k_ptr,
    v_ptr,
    mask_ptr,
    out_ptr,
    parts_ptr,
    arrivals_ptr,
    scale,
    share,
    groups,
    values,
    length,
    span,
    q_B,
    q_H,
    q_D,
    k_B,
    k_G,
    k_L,
    k_D,
    v_B,
    v_G,
    v_L,
    v_D,
    mask_B,
    mask_L,
    MASK: tl.constexpr,
    SPLIT: tl.constexpr,
    LOOK: tl.constexpr,  # places of a span's mask that are looked at first, or 0
    HEADS: tl.constexpr,
    TALL: tl.constexpr,
    VALUES: tl.constexpr,
    BLOCK: tl.constexpr,
    MERGED: tl.constexpr,
    LATER: tl.constexpr,
    EARLY: tl.constexpr,
):
    wait(LATER)
    release(EARLY)
    at, pair = tl.program_id(0), tl.program_id(1)
    spans, pairs = tl.num_programs(0), tl.num_programs(1)
    sequence, group = tl.cast(pair // groups, tl.int64), tl.cast(pair % groups, tl.int64)
    q_ptr += sequence * q_B + group * share * q_H
    k_ptr += sequence * k_B + group * k_G
    v_ptr += sequence * v_B + group * v_G
    mask_ptr += sequence * mask_B
    head, value, step = tl.arange(0, TALL), tl.arange(0, VALUES), tl.arange(0, BLOCK)
    there = value < values
    q_at = tl.cast(head, tl.int64)[:, None] * q_H + value[None, :] * q_D
    held = (head < share)[:, None] & there[None, :]
    q = tl.load(q_ptr + q_at, mask=held, other=0.0)

    first = at * span
    end = tl.minimum(first + span, length)
    if LOOK > 0 and MASK != "none":
        place = first + tl.arange(0, LOOK)
        seen = tl.load(mask_ptr + tl.cast(place, tl.int64) * mask_L, mask=place < end, other=0)
        counts = (place < end) & _left(seen, MASK)
        begun = tl.min(tl.where(counts, place, end), axis=0)
        first += (begun - first) // BLOCK * BLOCK
        end = tl.max(tl.where(counts, place + 1, first), axis=0)

    top = tl.full((TALL,), float("-inf"), tl.float32)
    total = tl.zeros((TALL,), tl.float32)
    sums = tl.zeros((TALL, VALUES), tl.float32)
    for begin in range(first, end, BLOCK):
        left = begin + step < end
        inside = left[:, None] & there[None, :]
        of = tl.cast(begin, tl.int64)
        k_at = of * k_L + tl.cast(step, tl.int64)[:, None] * k_L + value[None, :] * k_D
        v_at = of * v_L + tl.cast(step, tl.int64)[:, None] * v_L + value[None, :] * v_D
        k = tl.load(k_ptr + k_at, mask=inside, other=0.0)
        v = tl.load(v_ptr + v_at, mask=inside, other=0.0)
        if MASK != "none":
            mask_at = (of + step) * mask_L
            known = tl.load(mask_ptr + mask_at, mask=left, other=0)
            left = left & _left(known, MASK)
            v = tl.where(left[:, None], v, tl.zeros_like(v))  # 0 NaN is NaN
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if MASK == "added":
            s += known.to(tl.float32)[None, :]
        s = tl.where(left[None, :], s, float("-inf"))
        higher = tl.maximum(top, tl.max(s, axis=1))
        p = _exp(s, higher[:, None])
        kept = _exp(top, higher)
        total = total * kept + tl.sum(p, axis=1)
        sums = tl.dot(p.to(v.dtype), v, sums * kept[:, None], input_precision="ieee")
        top = higher

    out_ptr += (sequence * groups + group) * share * values
    if SPLIT:
        rows = tl.cast(pairs * spans, tl.int64) * share
        tops_ptr = parts_ptr + rows * values
        totals_ptr = tops_ptr + rows
        begin_of = tl.cast(pair * spans, tl.int64) * share  # this pair's first row
        row = begin_of + at * share + head
        tl.store(tops_ptr + row, top, mask=head < share)
        tl.store(totals_ptr + row, total, mask=head < share)
        tl.store(parts_ptr + row[:, None] * values + value[None, :], sums, mask=held)
        tl.debug_barrier()  # all of this program's are written before it says so
        arrived = tl.atomic_add(arrivals_ptr + pair, 1, sem="acq_rel")
        release(LATER)
        if arrived == spans - 1:
            tl.store(arrivals_ptr + pair, 0)
            _merge(
                out_ptr, parts_ptr, tops_ptr, totals_ptr, begin_of, spans, share, values,
                HEADS, VALUES, MERGED,
            )  # fmt: skip
    else:
        release(LATER)
        out = sums / tl.where(total > 0, total, 1.0)[:, None]
        out_at = head[:, None] * values + value[None, :]
        tl.store(out_ptr + out_at, out.to(out_ptr.dtype.element_ty), mask=held)


@triton.jit
def _merge(
    out_ptr,
    parts_ptr,
    tops_ptr,
    totals_ptr,
    begin_of,
    spans,
    share,
    values,
    HEADS: tl.constexpr,
    VALUES: tl.constexpr,
    MERGED: tl.constexpr,
):
    """Of one pair all spans, in their order."""
    head, value, some = tl.arange(0, HEADS), tl.arange(0, VALUES), tl.arange(0, MERGED)
    top = tl.full((HEADS,), float("-inf"), tl.float32)
    total = tl.zeros((HEADS,), tl.float32)
    sums = tl.zeros((HEADS, VALUES), tl.float32)
    held = (head < share)[:, None] & (value < values)[None, :]
    for first in range(0, spans, MERGED):
        span = first + some
        row = begin_of + span[:, None] * share + head[None, :]
        known = (span < spans)[:, None] & (head < share)[None, :]
        tops = tl.load(tops_ptr + row, mask=known, other=float("-inf"), cache_modifier=".cg")
        totals = tl.load(totals_ptr + row, mask=known, other=0.0, cache_modifier=".cg")
        parts = tl.load(
            parts_ptr + row[:, :, None] * values + value[None, None, :],
            mask=(span < spans)[:, None, None] & held[None, :, :],
            other=0.0,
            cache_modifier=".cg",
        )
        higher = tl.maximum(top, tl.max(tops, axis=0))
        kept = _exp(top, higher)
        weight = _exp(tops, higher[None, :])
        total = total * kept + tl.sum(totals * weight, axis=0)
        sums = sums * kept[:, None] + tl.sum(parts * weight[:, :, None], axis=0)
        top = higher
    out = sums / tl.where(total > 0, total, 1.0)[:, None]
    out_at = head[:, None] * values + value[None, :]
    tl.store(out_ptr + out_at, out.to(out_ptr.dtype.element_ty), mask=held)


@triton.jit
def _left(known, MASK: tl.constexpr):
    """Whether a mask leaves a place."""
    if MASK == "kept":
        return known != 0
    else:
        return known.to(tl.float32) != float("-inf")


@triton.jit
def _exp(value, top):
    """e^(value - top), where nothing at all was left as well: 0."""
    return tl.exp2((value - tl.where(top == float("-inf"), 0.0, top)) * _LOG2_E)
