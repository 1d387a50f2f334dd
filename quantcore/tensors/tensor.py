"""A quantized weight as a torch tensor: the one type for every scheme, inside ordinary nn.Linear.

    model.proj.weight = nn.Parameter(QuantizedTensor.of(linear, torch.bfloat16), False)
    y = model.proj(x)                    # activations are rounded in here, as the scheme has it

It poses as a dense (O, I) weight of a floating dtype and holds the inner tensors of its layout
(packing.py). What torch's operators do with it is a table (operators.py), and so is which kernel
multiplies by it (kernels.py). It serves: it has no gradient, and hands on its inputs', by what it
dequantizes to, since a model that is compiled with gradients on has its backward traced as well.

Shape suffixes: O = out_features, I = in_features, G = groups per row, T = tokens.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from quantcore.affine import Qparams, dequantize
from quantcore.errors import QuantizationError
from quantcore.formats.base import QuantizedLinear
from quantcore.schemes import Scheme
from quantcore.tensors.layouts import Layout

INNER = ("codes", "scale", "zero", "places", "input_scale", "input_factor")


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """All of a quantized tensor that is no tensor."""

    scheme: Scheme
    layout: Layout
    features: tuple[int, int]  # (O, I), however the tensor is turned
    dtype: torch.dtype  # what it reads back as
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.features
        return (columns, rows) if self.transposed else (rows, columns)


class QuantizedTensor(Tensor):
    """See above. Its inner tensors, None where there is none:

    codes         as the layout has them
    scale, zero   (O, G); zero is int8, or in the scale's dtype. Layouts for int4 kernels have
                  scale (G, O, 2) alone: a group's scale and its float zero point, in `dtype`
    places        of 2:4 sparse codes, where they stood in their rows
    input_scale   (1,), of static schemes
    input_factor  float32 (I,): inputs are divided by it first (SmoothQuant)
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    places: Tensor | None
    input_scale: Tensor | None
    input_factor: Tensor | None
    facts: Facts

    @staticmethod
    def __new__(cls, inner: Mapping[str, Tensor], facts: Facts) -> Self:
        made: Self = torch.Tensor._make_wrapper_subclass(
            cls, facts.shape, dtype=facts.dtype, device=inner["codes"].device
        )
        return made

    def __init__(self, inner: Mapping[str, Tensor], facts: Facts) -> None:
        for name in INNER:
            setattr(self, name, inner.get(name))
        self.facts = facts

    @classmethod
    def of(cls, linear: QuantizedLinear, dtype: torch.dtype) -> "QuantizedTensor":
        """A quantized linear's weight in the plain layout, its scales as they were stored."""
        from quantcore.tensors.packing import plain

        return plain(linear, dtype)

    @property
    def scheme(self) -> Scheme:
        return self.facts.scheme

    @property
    def layout_name(self) -> Layout:  # `layout` is torch's own
        return self.facts.layout

    def parts(self) -> dict[str, Tensor]:
        """The tensors it is made of, by name."""
        return {n: getattr(self, n) for n in INNER if getattr(self, n) is not None}

    def mapped(self, change: Callable[[str, Tensor], Tensor], **facts: Any) -> "QuantizedTensor":
        """The same with every inner tensor changed, and some facts."""
        inner = {name: change(name, tensor) for name, tensor in self.parts().items()}
        return QuantizedTensor(inner, replace(self.facts, **facts))

    def read(self) -> tuple[Tensor, Qparams]:
        """Codes, int8 (O, I), and their scales and zero points, float32, of any layout."""
        from quantcore.tensors.packing import PACKINGS

        return PACKINGS[self.layout_name].unpack(self)

    def dequantize(self) -> Tensor:
        """The dense weight that it stands for, its input factor within it.

        So it is for inputs as they were before any smoothing.
        """
        w_OI = self.read_back()
        if self.input_factor is not None:
            w_OI = w_OI / self.input_factor
        w_OI = w_OI.to(self.dtype)
        return w_OI.t() if self.facts.transposed else w_OI

    def read_back(self) -> Tensor:
        """The values of the codes, float32 (O, I): for inputs that were divided by the factor."""
        codes_OI, qparams = self.read()
        return dequantize(codes_OI, qparams, self.scheme)

    def num_bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.parts().values())

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        facts = self.facts
        turned = ", transposed" if facts.transposed else ""
        return (
            f"QuantizedTensor({facts.scheme.label()}, {facts.layout}, shape={tuple(self.shape)}, "
            f"dtype={self.dtype}, device='{self.device}'{turned})"
        )

    def __tensor_flatten__(self) -> tuple[list[str], Facts]:
        return list(self.parts()), self.facts

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, Tensor], facts: Facts, outer_size: Any, outer_stride: Any
    ) -> "QuantizedTensor":
        return QuantizedTensor(inner, facts)

    def _stable_hash_for_caching(self) -> str:
        """For torch.compile's cache between runs: what of this tensor is compiled in."""
        return repr((self.facts, list(self.parts())))

    def __deepcopy__(self, memo: dict[int, Any]) -> "QuantizedTensor":
        if id(self) in memo:
            known: QuantizedTensor = memo[id(self)]
            return known
        copied = self.mapped(lambda _, tensor: tensor.clone())
        if isinstance(self, torch.nn.Parameter):
            copied = torch.nn.Parameter(copied, requires_grad=False)  # type: ignore[assignment]
        memo[id(self)] = copied
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise QuantizationError(
            "a quantized tensor is not pickled: write its state with "
            "quantcore.tensors.flatten_state, which gives plain tensors and JSON"
        )

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Products take tokens as rows, whatever dimensions stand before them."""
        from quantcore.tensors.operators import FOLDED

        with torch._C.DisableTorchFunctionSubclass():
            if func in FOLDED:
                return FOLDED[func](*args, **(kwargs or {}))
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        from quantcore.tensors.operators import OPERATORS

        operator = OPERATORS.get(func)
        if operator is None:
            raise NotImplementedError(
                f"{func} of a quantized tensor: write .dequantize() first for a dense one"
            )
        return operator(func, *args, **(kwargs or {}))
