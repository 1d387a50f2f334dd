"""A quantized linear as a module: its stored numbers, dequantized whenever it is called.

Slow and exact: it computes what a fast kernel is to compute. Shape suffixes: O = out_features,
I = in_features, G = groups per row.
"""

import torch
from torch import Tensor, nn

from quantcore.activations import fake_quantize
from quantcore.affine import Qparams, dequantize
from quantcore.formats.base import QuantizedLinear


class ServedLinear(nn.Module):
    """y = served(x / factor) W^T + b, in x's dtype; activations rounded as the scheme has it."""

    codes_OI: Tensor
    scale_OG: Tensor
    zero_OG: Tensor
    factor_I: Tensor | None

    def __init__(self, linear: QuantizedLinear, bias: Tensor | None) -> None:
        super().__init__()
        self._scheme = linear.scheme
        self._input_scale = linear.input_scale
        self.register_buffer("codes_OI", linear.codes_OI)
        self.register_buffer("scale_OG", linear.qparams.scale_OG)
        self.register_buffer("zero_OG", linear.qparams.zero_OG)
        self.register_buffer("factor_I", linear.input_factor_I)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.out_features, self.in_features = linear.codes_OI.shape

    def forward(self, x_TI: Tensor) -> Tensor:
        dtype = x_TI.dtype
        if self.factor_I is not None:
            x_TI = (x_TI.float() / self.factor_I).to(dtype)
        x_TI = fake_quantize(x_TI, self._scheme, self._input_scale)
        qparams = Qparams(self.scale_OG.float(), self.zero_OG)
        w_OI = dequantize(self.codes_OI, qparams, self._scheme)
        return torch.nn.functional.linear(x_TI, w_OI.to(dtype), self.bias)
