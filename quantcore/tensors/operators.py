"""What torch's operators do with a quantized tensor: one row each; all others are refused by name.

Slices share memory with the whole, so that `weight.narrow(0, first, rows).copy_(shard)` fills a
part of it: tensor parallel engines load their shards so. Rows are cut anywhere, columns at the
borders of groups. A weight cut by columns rounds its inputs by the ranges of its own part.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing as _untyped

from quantcore.errors import QuantizationError
from quantcore.tensors.kernels import multiply
from quantcore.tensors.layouts import LAYOUTS, Layout
from quantcore.tensors.tensor import QuantizedTensor

aten = torch.ops.aten

_aliased: Callable[..., Any] = _untyped

# In these layouts the scale has a group's zero point beside it, and is kept in the tensor's dtype
_PAIRED = (Layout.TENSOR_CORE_TILED, Layout.INT4_CPU)


def _linear(_func: Any, x: Tensor, weight: Any, bias: Tensor | None = None) -> Tensor:
    _refuse_unless(weight, transposed=False, operation="linear")
    rows_TI = x.reshape(-1, x.shape[-1])
    return multiply(rows_TI, weight, bias).reshape(*x.shape[:-1], weight.facts.features[0])


def _matmul(_func: Any, x: Tensor, weight: Any) -> Tensor:
    if isinstance(weight, QuantizedTensor) and not weight.facts.transposed:
        return x @ weight.dequantize()  # of a linear's outputs, the gradient of its inputs
    _refuse_unless(weight, transposed=True, operation="matmul")
    return _linear(_func, x, weight.t(), None)


def _addmm(
    _func: Any, bias: Tensor, x: Tensor, weight: Any, *, beta: float = 1, alpha: float = 1
) -> Tensor:
    _refuse_unless(weight, transposed=True, operation="addmm")
    if (beta, alpha) == (1, 1) and bias.dim() == 1:
        return multiply(x, weight.t(), bias)
    return beta * bias + alpha * multiply(x, weight.t(), None)


def _refuse_unless(weight: Any, *, transposed: bool, operation: str) -> None:
    if not isinstance(weight, QuantizedTensor):
        raise NotImplementedError(
            f"{operation} with a quantized tensor on the left: write it on the right, transposed"
        )
    if weight.facts.transposed != transposed:
        raise NotImplementedError(
            f"{operation} sums over the inputs of a quantized weight: write F.linear(x, weight) "
            "or x @ weight.t(), or weight.dequantize() for another product"
        )


def _same(change: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    """An operator that does to the whole what it does to each inner tensor."""

    def run(func: Any, weight: QuantizedTensor, *args: Any, **kwargs: Any) -> Any:
        made = weight.mapped(lambda _, tensor: change(tensor))
        return _aliased(func, (weight, *args), kwargs, made)

    return run


def _transpose(func: Any, weight: QuantizedTensor, *args: Any) -> Any:
    """With two dimensions there is one way to turn: t(), transpose(0, 1), permute(1, 0)."""
    flat = args[0] if args and not isinstance(args[0], int) else args
    turned = [dim % 2 for dim in flat] in ([], [0, 1], [1, 0])
    if func is aten.permute.default:
        turned = [dim % 2 for dim in flat] == [1, 0]
    if not turned:
        raise NotImplementedError(f"{func} of a quantized tensor by {flat}: write .t()")
    made = weight.mapped(lambda _, tensor: tensor, transposed=not weight.facts.transposed)
    return _aliased(func, (weight, *args), {}, made)


def _to(
    func: Any,
    weight: QuantizedTensor,
    *,
    dtype: torch.dtype | None = None,
    device: Any = None,
    non_blocking: bool = False,
    **_kept: Any,
) -> Any:
    """To a device, or to read back as another dtype; its codes and scales stay as they are."""
    dtype = dtype or weight.dtype
    layout = weight.layout_name
    if not dtype.is_floating_point:
        raise NotImplementedError(f"a quantized tensor as {dtype}: write a floating dtype")
    devices = LAYOUTS[layout].devices
    if device is not None and devices and torch.device(device).type not in (*devices, "meta"):
        raise QuantizationError(
            f"layout '{layout}' is of the {' or '.join(devices)}: write relayout(weight, 'plain') "
            f"before .to('{device}')"
        )
    dtypes = LAYOUTS[layout].dtypes
    if dtypes and str(dtype).removeprefix("torch.") not in dtypes:
        raise QuantizationError(
            f"layout '{layout}' computes in {' or '.join(dtypes)}: write relayout(weight, 'plain') "
            f"before .to({dtype})"
        )

    def moved(name: str, tensor: Tensor) -> Tensor:
        own = dtype if name == "scale" and layout in _PAIRED else tensor.dtype
        return tensor.to(device=device, dtype=own, non_blocking=non_blocking, copy=True)

    return weight.mapped(moved, dtype=dtype)


def _slice(
    func: Any,
    weight: QuantizedTensor,
    dim: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> Any:
    size = weight.shape[dim]
    first = min(max(0 if start is None else start + size * (start < 0), 0), size)
    last = min(max(size if end is None else end + size * (end < 0), first), size)
    if step != 1:
        raise QuantizationError("slices of a quantized tensor have no step: write narrow()")
    made = _cut(weight, dim % 2, first, last)
    return _aliased(func, (weight, dim, start, end, step), {}, made)


def _split(func: Any, weight: QuantizedTensor, sizes: Any, dim: int = 0) -> Any:
    whole = weight.shape[dim]
    if isinstance(sizes, int):
        sizes = [min(sizes, whole - first) for first in range(0, whole, sizes)]
    parts, first = [], 0
    for size in sizes:
        parts.append(aten.slice.Tensor(weight, dim, first, first + size))
        first += size
    return parts


def _select(func: Any, weight: QuantizedTensor, dim: int, index: int) -> Any:
    raise QuantizationError(
        f"a quantized tensor keeps both dimensions: write narrow({dim}, {index}, 1), no select"
    )


def _cut(weight: QuantizedTensor, dim: int, first: int, last: int) -> QuantizedTensor:
    """Rows or columns [first, last) of the weight, sharing its memory."""
    facts = weight.facts
    dim = 1 - dim if facts.transposed else dim
    if (first, last) == (0, facts.features[dim]):
        return weight.mapped(lambda _, tensor: tensor)
    if facts.layout not in (Layout.PLAIN, Layout.SPARSE_24):
        raise QuantizationError(
            f"a weight in the layout '{facts.layout}' is not cut: write relayout(weight, 'plain') "
            "first, and give each part its layout"
        )
    features = (last - first, facts.features[1])
    if dim == 0:
        shared = ("input_scale", "input_factor")
        return weight.mapped(lambda n, t: t if n in shared else t[first:last], features=features)
    features = (facts.features[0], last - first)
    size = facts.scheme.group_size or 1
    packed = 2 if facts.scheme.bits == 4 else 8 if facts.layout == Layout.SPARSE_24 else 1
    border = max(size, packed)
    if first % border or (last % border and last != facts.features[1]):
        raise QuantizationError(
            f"columns {first} to {last} of {facts.scheme.label()}: write multiples of {border}"
        )
    groups = slice(None) if facts.scheme.group_size is None else slice(first // size, last // size)

    def columns(name: str, tensor: Tensor) -> Tensor:
        if name in ("scale", "zero"):
            return tensor[:, groups]
        if name == "input_scale":
            return tensor
        if name == "input_factor":
            return tensor[first:last]
        in_each = -(-facts.features[1] // tensor.shape[1])
        return tensor[:, first // in_each : -(-last // in_each)]

    return weight.mapped(columns, features=features)


def _copy(func: Any, weight: Any, source: Any, non_blocking: bool = False) -> Any:
    if not isinstance(weight, QuantizedTensor) or not isinstance(source, QuantizedTensor):
        raise QuantizationError(
            "copy_ between a quantized and a dense tensor: write .dequantize() of the one, or "
            "quantize the other first"
        )
    wanted, given = replace(weight.facts, dtype=source.dtype), source.facts
    if wanted != given or weight.parts().keys() != source.parts().keys():
        raise QuantizationError(f"copy_ of {source!r} into {weight!r}: write two of a kind")
    for name, tensor in weight.parts().items():
        other = source.parts()[name]
        if tensor.dtype != other.dtype:
            raise QuantizationError(
                f"copy_ of a {name} in {other.dtype} into {tensor.dtype}: write two of a kind"
            )
        tensor.copy_(other, non_blocking)
    return weight


OPERATORS: dict[Any, Callable[..., Any]] = {
    aten.linear.default: _linear,
    aten.matmul.default: _matmul,
    aten.mm.default: _matmul,
    aten.addmm.default: _addmm,
    aten.t.default: _transpose,
    aten.transpose.int: _transpose,
    aten.permute.default: _transpose,
    aten.detach.default: _same(torch.Tensor.detach),
    aten.alias.default: _same(lambda tensor: tensor),
    aten.clone.default: _same(torch.clone),
    aten.contiguous.default: _same(torch.Tensor.contiguous),
    aten.empty_like.default: _same(torch.empty_like),
    aten.lift_fresh.default: _same(lambda tensor: tensor),
    aten._to_copy.default: _to,
    aten.slice.Tensor: _slice,
    aten.split.Tensor: _split,
    aten.split_with_sizes.default: _split,
    aten.select.int: _select,
    aten.copy_.default: _copy,
}


def _folded_linear(x: Any, weight: Any, bias: Tensor | None = None) -> Any:
    """Two-dimensional, so that torch has no reason to expand the weight for a batched product."""
    if not isinstance(weight, QuantizedTensor) or isinstance(x, QuantizedTensor):
        return torch.nn.functional.linear(x, weight, bias)
    rows_TI = x.reshape(-1, x.shape[-1])
    product = multiply if _at_once(x, weight) else torch.nn.functional.linear
    y_TO = product(rows_TI, weight, bias)
    return y_TO.reshape(*x.shape[:-1], weight.shape[0])


def _at_once(x: Tensor, weight: QuantizedTensor) -> bool:
    """Whether a product needs none of torch's dispatcher: no tracing, no autocast, no gradient.

    There a linear becomes a transposition and a product, and two tensors are made around the
    weight: 20 microseconds of Python a call, as long as a small layer takes for a token.
    """
    return not (
        torch.compiler.is_compiling()
        or weight.facts.transposed
        or (x.requires_grad and torch.is_grad_enabled())
        or x.device.type == "meta"  # which knows no autocast
        or torch.is_autocast_enabled(x.device.type)
    )


def _folded_matmul(x: Any, weight: Any) -> Any:
    if not isinstance(weight, QuantizedTensor) or isinstance(x, QuantizedTensor):
        return torch.matmul(x, weight)
    _refuse_unless(weight, transposed=True, operation="matmul")
    y_TO = torch.mm(x.reshape(-1, x.shape[-1]), weight)
    return y_TO.reshape(*x.shape[:-1], weight.shape[1])


FOLDED: dict[Any, Callable[..., Any]] = {
    torch.nn.functional.linear: _folded_linear,
    torch.matmul: _folded_matmul,
    torch.Tensor.matmul: _folded_matmul,
    torch.Tensor.__matmul__: _folded_matmul,
}
