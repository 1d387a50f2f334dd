"""From codes and scales to a layout's inner tensors and back, in plain torch where that is known.

The tiles of tinygemm are written out here, so that they are made and read on any device: code n, k
goes to tile n / 8, k / (16 * depth), lane 4 * (n % 8) + (k % 8) / 2; within a lane two tiles of 16
columns share a word. int4_cpu's bytes are torch's own affair, and differ from CPU to CPU: they are
read by multiplying by the identity, whose products are exact.

Shape suffixes: O = out_features, I = in_features, G = groups per row.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from quantkernels.weight_only import pack
from quantkernels.weight_only.tiles import (
    grouping,
    pack_groups,
    unpack_codes,
    unpack_groups,
)
from torch import Tensor

from quantcore.affine import Qparams
from quantcore.errors import QuantizationError
from quantcore.formats.base import QuantizedLinear, int8_codes
from quantcore.nibbles import packed_nibbles, unpacked_nibbles
from quantcore.tensors.layouts import Layout, refusal
from quantcore.tensors.tensor import Facts, QuantizedTensor
from quantcore.tensors.weight_only import codes_kind

_LANES, _TILE_ROWS, _TILE_COLUMNS = 32, 8, 16


@dataclass(frozen=True, slots=True)
class Packing:
    """`pack` takes a plain tensor and gives the inner tensors of the layout's own."""

    pack: Callable[[QuantizedTensor], dict[str, Tensor]]
    unpack: Callable[[QuantizedTensor], tuple[Tensor, Qparams]]


def plain(linear: QuantizedLinear, dtype: torch.dtype) -> QuantizedTensor:
    scheme, qparams = linear.scheme, linear.qparams
    codes_OI = linear.codes_OI
    inner = {
        "codes": packed_nibbles(codes_OI) if scheme.bits == 4 else linear.stored_codes(),
        "scale": qparams.scale_OG.to(linear.scale_dtype).contiguous(),
    }
    if scheme.zero_point == "int":
        inner["zero"] = qparams.zero_OG.contiguous()
    elif scheme.zero_point == "float":
        inner["zero"] = qparams.zero_OG.to(linear.scale_dtype).contiguous()
    if linear.input_scale is not None:
        inner["input_scale"] = torch.tensor([linear.input_scale], device=codes_OI.device)
    if linear.input_factor_I is not None:
        inner["input_factor"] = linear.input_factor_I
    features = (codes_OI.shape[0], codes_OI.shape[1])
    facts = Facts(scheme=scheme, layout=Layout.PLAIN, features=features, dtype=dtype)
    return QuantizedTensor(inner, facts)


def relayout(weight: QuantizedTensor, layout: Layout | str) -> QuantizedTensor:
    """The same weight in another layout: the same codes, and the same values.

    tensor_core_tiled and int4_cpu keep scales and zero points in the tensor's dtype, as their
    kernels read them; what reads back differs by that rounding. sparse_24 wants a weight with at
    least two zeros in every four neighbours of a row: see `pruned_24`.

    Raises QuantizationError, naming what to write instead, for a weight that can't lie so.
    """
    layout = Layout(layout)
    if weight.layout_name == layout:
        return weight
    why = refusal(
        layout,
        weight.scheme,
        weight.facts.features,
        str(weight.dtype).removeprefix("torch."),
        weight.device.type,
    )
    if why is not None:
        raise QuantizationError(f"layout '{layout}' {why}")
    if weight.layout_name != Layout.PLAIN:
        inner = _plain_inner(weight)
        weight = QuantizedTensor(inner, replace(weight.facts, layout=Layout.PLAIN))
    if layout == Layout.PLAIN:
        return weight
    kept = {n: t for n, t in weight.parts().items() if n.startswith("input_")}
    inner = PACKINGS[layout].pack(weight) | kept
    return QuantizedTensor(inner, replace(weight.facts, layout=layout))


def _plain_inner(weight: QuantizedTensor) -> dict[str, Tensor]:
    codes_OI, qparams = weight.read()
    linear = QuantizedLinear(
        codes_OI, qparams, weight.scheme, None, weight.input_factor, weight.scale.dtype
    )
    inner = plain(linear, weight.dtype).parts()
    return inner if weight.input_scale is None else inner | {"input_scale": weight.input_scale}


def _unpack_plain(weight: QuantizedTensor) -> tuple[Tensor, Qparams]:
    codes_OI = _plain_codes(weight)
    return codes_OI, _qparams(weight)


def _plain_codes(weight: QuantizedTensor) -> Tensor:
    if weight.scheme.bits == 4:
        return unpacked_nibbles(weight.codes, weight.facts.features[1])
    return int8_codes(weight.codes)


def _qparams(weight: QuantizedTensor) -> Qparams:
    scale_OG = weight.scale.float()
    if weight.zero is None:
        return Qparams(scale_OG, torch.zeros_like(scale_OG, dtype=torch.int8))
    return Qparams(
        scale_OG, weight.zero.float() if weight.scheme.zero_point == "float" else weight.zero
    )


def _scale_and_zero(weight: QuantizedTensor) -> Tensor:
    """(G, O, 2) in the tensor's dtype, as torch's int4 kernels read them."""
    qparams = _qparams(weight)
    pair_OG2 = torch.stack([qparams.scale_OG, qparams.zero_OG.float()], dim=-1)
    return pair_OG2.transpose(0, 1).to(weight.dtype).contiguous()


def _from_pair(weight: QuantizedTensor) -> Qparams:
    scale_OG, zero_OG = weight.scale.float().transpose(0, 1).unbind(-1)
    if weight.scheme.zero_point == "none":
        zero_OG = torch.zeros_like(zero_OG, dtype=torch.int8)
    return Qparams(scale_OG.contiguous(), zero_OG.contiguous())


def _pack_tiles(weight: QuantizedTensor) -> dict[str, Tensor]:
    """int32 (O / 8, I / (16 depth), 32, depth / 2): one word holds 8 codes of a row."""
    rows, columns = weight.facts.features
    depth = tile_depth(columns)
    nibbles_OI = (_plain_codes(weight).int() + 8).reshape(
        rows // _TILE_ROWS, _TILE_ROWS, columns // (_TILE_COLUMNS * depth), depth // 2, 2, 2, 4, 2
    )  # row tile, row, column tile, pair, which of the pair, half of 8, lane of 4, low or high
    words = nibbles_OI.permute(0, 2, 1, 6, 3, 7, 4, 5)  # ..., high or low, which, half
    shifts = torch.arange(8, device=words.device, dtype=torch.int32) * 4
    wide = (words.reshape(*words.shape[:5], 8).long() << shifts).sum(-1)
    wide = torch.where(wide >= 1 << 31, wide - (1 << 32), wide)
    tiles = wide.to(torch.int32).reshape(
        rows // _TILE_ROWS, columns // (_TILE_COLUMNS * depth), _LANES, depth // 2
    )
    return {"codes": tiles.contiguous(), "scale": _scale_and_zero(weight)}


def _unpack_tiles(weight: QuantizedTensor) -> tuple[Tensor, Qparams]:
    rows, columns = weight.facts.features
    depth = tile_depth(columns)
    shifts = torch.arange(8, device=weight.codes.device, dtype=torch.int32) * 4
    nibbles = (weight.codes[..., None] >> shifts) & 15
    words = nibbles.reshape(*weight.codes.shape[:2], _TILE_ROWS, 4, depth // 2, 2, 2, 2)
    codes = words.permute(0, 2, 1, 4, 6, 7, 3, 5).reshape(rows, columns) - 8
    return codes.to(torch.int8), _from_pair(weight)


def _pack_triton(weight: QuantizedTensor) -> dict[str, Tensor]:
    columns = weight.facts.features[1]
    group = grouping(weight.scheme.group_size, zero=weight.zero is not None)
    inner = {
        "codes": pack(_plain_codes(weight), codes_kind(weight.scheme)),
        "scale": pack_groups(weight.scale, columns, group),
    }
    if weight.zero is not None:
        # whole ones in the scale's dtype, every one of which holds them exactly
        inner["zero"] = pack_groups(weight.zero.to(weight.scale.dtype), columns, group)
    return inner


def _unpack_triton(weight: QuantizedTensor) -> tuple[Tensor, Qparams]:
    features, size = weight.facts.features, weight.scheme.group_size
    codes_OI = unpack_codes(weight.codes, codes_kind(weight.scheme), features)
    scale_OG = unpack_groups(weight.scale, features, size)
    if weight.zero is None:
        return codes_OI, Qparams(scale_OG, torch.zeros_like(scale_OG, dtype=torch.int8))
    zero_OG = unpack_groups(weight.zero, features, size)
    whole = weight.scheme.zero_point == "int"
    return codes_OI, Qparams(scale_OG, zero_OG.to(torch.int8) if whole else zero_OG)


def tile_depth(columns: int) -> int:
    """How many tiles of 16 columns lie together: the most that divide a row, up to 8."""
    return next(depth for depth in (8, 4, 2) if columns % (_TILE_COLUMNS * depth) == 0)


def _pack_int4_cpu(weight: QuantizedTensor) -> dict[str, Tensor]:
    nibbles_OI = _plain_codes(weight).int() + 8
    codes = torch.ops.aten._convert_weight_to_int4pack_for_cpu(nibbles_OI, 1)
    return {"codes": codes, "scale": _scale_and_zero(weight)}


def _unpack_int4_cpu(weight: QuantizedTensor) -> tuple[Tensor, Qparams]:
    rows, columns = weight.facts.features
    size = weight.scheme.group_size
    return _int4_cpu_codes(weight.codes, rows, columns, size), _from_pair(weight)


@torch.library.custom_op("quantcore::int4_cpu_codes", mutates_args=())
def _int4_cpu_codes(codes: Tensor, rows: int, columns: int, size: int) -> Tensor:
    """An operator, since Inductor refuses a kernel whose other inputs it makes itself."""
    unit = torch.zeros(columns // size, rows, 2, dtype=torch.bfloat16)
    unit[..., 0] = 1
    codes_IO = torch.ops.aten._weight_int4pack_mm_for_cpu(
        torch.eye(columns, dtype=torch.bfloat16), codes, size, unit
    )
    codes_OI: Tensor = codes_IO.t().round().to(torch.int8).contiguous()
    return codes_OI


@_int4_cpu_codes.register_fake
def _(codes: Tensor, rows: int, columns: int, _size: int) -> Tensor:
    return codes.new_empty(rows, columns, dtype=torch.int8)


def _pack_int4_dynamic(weight: QuantizedTensor) -> dict[str, Tensor]:
    rows, columns = weight.facts.features
    nibbles_OI = (_plain_codes(weight) + 8).to(torch.uint8)
    pairs = nibbles_OI[:, ::2] | (nibbles_OI[:, 1::2] << 4)
    size = weight.scheme.group_size or columns
    # ARM's kernels read the scales of groups in bfloat16 and those of rows in float32
    scale_OG = weight.scale.to(torch.float32 if size == columns else torch.bfloat16)
    codes = torch.ops.aten._dyn_quant_pack_4bit_weight(
        pairs.contiguous(), scale_OG.contiguous(), None, size, columns, rows
    )
    return {"codes": codes, "scale": scale_OG.contiguous()}


def _unpack_int4_dynamic(weight: QuantizedTensor) -> tuple[Tensor, Qparams]:
    """A one alone in its row is rounded to itself, but for the last bit of float32."""
    rows, columns = weight.facts.features
    size = weight.scheme.group_size or columns
    w_IO = torch.ops.aten._dyn_quant_matmul_4bit(
        torch.eye(columns), weight.codes, size, columns, rows
    )
    qparams = _qparams(weight)
    groups_OGI = w_IO.t().reshape(rows, qparams.scale_OG.shape[1], -1)
    codes_OGI = (groups_OGI / qparams.scale_OG[..., None]).round()
    return codes_OGI.reshape(rows, columns).to(torch.int8), qparams


def _fours(weight: QuantizedTensor, layout: Layout) -> Tensor:
    """Codes by fours, (O, I / 4, 4), with at most two in each that are not zero."""
    rows, columns = weight.facts.features
    codes_OJ4 = _plain_codes(weight).reshape(rows, columns // 4, 4)
    crowded = int(((codes_OJ4 != 0).sum(-1) > 2).sum().item())
    if crowded:
        raise QuantizationError(
            f"layout '{layout}' holds two numbers of every four, and {crowded} of "
            f"{rows * columns // 4} have more: write pruned_24(weight) before it is quantized"
        )
    return codes_OJ4


def _pack_sparse(weight: QuantizedTensor) -> dict[str, Tensor]:
    rows, columns = weight.facts.features
    codes_OJ4 = _fours(weight, Layout.SPARSE_24)
    # the first two that are not zero; where there are fewer, zeros stand in, in rising order
    order_OJ4 = (codes_OJ4 == 0).to(torch.int8).argsort(dim=-1, stable=True)
    kept_OJ2 = order_OJ4[..., :2].sort(dim=-1).values
    values = codes_OJ4.gather(-1, kept_OJ2).reshape(rows, columns // 2)
    pairs_OJ = (kept_OJ2[..., 0] | (kept_OJ2[..., 1] << 2)).to(torch.uint8)
    return {
        "codes": values.contiguous(),
        "places": (pairs_OJ[:, ::2] | (pairs_OJ[:, 1::2] << 4)).contiguous(),
        "scale": weight.scale,
    }


def _unpack_sparse(weight: QuantizedTensor) -> tuple[Tensor, Qparams]:
    assert weight.places is not None
    rows, columns = weight.facts.features
    pairs_OJ = torch.stack([weight.places & 15, weight.places >> 4], dim=-1).flatten(1)
    kept_OJ2 = torch.stack([pairs_OJ & 3, pairs_OJ >> 2], dim=-1).long()
    dense_OJ4 = torch.zeros(
        rows, columns // 4, 4, dtype=torch.int8, device=weight.codes.device
    ).scatter(-1, kept_OJ2, weight.codes.reshape(rows, -1, 2))
    return dense_OJ4.reshape(rows, columns), _qparams(weight)


def _pack_sparse_cuda(weight: QuantizedTensor) -> dict[str, Tensor]:
    if not torch.backends.cusparselt.is_available():
        raise QuantizationError("layout 'sparse_24_cuda' needs cuSPARSELt: write 'sparse_24'")
    codes_OI = _fours(weight, Layout.SPARSE_24_CUDA).flatten(1)
    return {"codes": torch._cslt_compress(codes_OI), "scale": weight.scale}


def _unpack_sparse_cuda(weight: QuantizedTensor) -> tuple[Tensor, Qparams]:
    """How cuSPARSELt packs is its own affair: multiplied by the identity, it gives exact codes."""
    columns = weight.facts.features[1]
    eye_II = torch.eye(columns, dtype=torch.int8, device=weight.codes.device)
    codes_OI = torch._cslt_sparse_mm(weight.codes, eye_II.t(), out_dtype=torch.int32)
    return codes_OI.to(torch.int8), _qparams(weight)


def pruned_24(w_OI: Tensor) -> Tensor:
    """The weight with the two smallest of every four neighbours in a row set to zero."""
    rows, columns = w_OI.shape
    groups_OJ4 = w_OI.reshape(rows, columns // 4, 4)
    smallest_OJ2 = groups_OJ4.abs().argsort(dim=-1, stable=True)[..., :2]
    return groups_OJ4.scatter(-1, smallest_OJ2, 0.0).reshape(rows, columns)


PACKINGS: dict[Layout, Packing] = {
    Layout.PLAIN: Packing(lambda weight: weight.parts(), _unpack_plain),
    Layout.TENSOR_CORE_TILED: Packing(_pack_tiles, _unpack_tiles),
    Layout.TRITON_TILED: Packing(_pack_triton, _unpack_triton),
    Layout.INT4_CPU: Packing(_pack_int4_cpu, _unpack_int4_cpu),
    Layout.INT4_DYNAMIC_CPU: Packing(_pack_int4_dynamic, _unpack_int4_dynamic),
    Layout.SPARSE_24: Packing(_pack_sparse, _unpack_sparse),
    Layout.SPARSE_24_CUDA: Packing(_pack_sparse_cuda, _unpack_sparse_cuda),
}
