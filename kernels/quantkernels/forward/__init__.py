"""Parts of a decoder block's forward that are bound by memory, each in one pass over it.

They round where transformers' own modules do: results differ in the order of one sum alone.
"""

from typing import Literal

from torch import Tensor

from quantkernels.forward import reference

FUSED_DEVICES = ("cuda", "xpu")

# Of RMS norms: (x / rms) in x's dtype times the weight, or (x / rms) (1 + weight) in float32
NormForm = Literal["scale", "offset"]

__all__ = ["NormForm", "rms_norm", "rotated", "silu_product"]


def rms_norm(x: Tensor, weight_I: Tensor, eps: float, form: NormForm) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last dimension, times the weight; in x's dtype.

    Zhang & Sennrich 2019, https://arxiv.org/abs/1910.07467, section 4. `x` is bfloat16 or float16
    on an accelerator, any float on a CPU; its last dimension is as long as the weight.
    """
    if x.device.type in FUSED_DEVICES:
        from quantkernels.forward import fused

        return fused.rms_norm(x, weight_I, eps, form)
    return reference.rms_norm(x, weight_I, eps, form)


def rotated(x_BHLD: Tensor, cos_BLD: Tensor, sin_BLD: Tensor) -> Tensor:
    """x cos + (-x2, x1) sin, where x1 and x2 are the halves of x: a rotary position embedding.

    Su et al. 2021, https://arxiv.org/abs/2104.09864, section 3.4.2, in the pairing of GPT-NeoX.
    Queries or keys of B sequences, H heads, L tokens, D values (an even number), any strides; the
    tables may have one sequence for all. Products are rounded to x's dtype before they are added.
    """
    if x_BHLD.device.type in FUSED_DEVICES:
        from quantkernels.forward import fused

        return fused.rotated(x_BHLD, cos_BLD, sin_BLD)
    return reference.rotated(x_BHLD, cos_BLD, sin_BLD)


def silu_product(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, the first rounded to the inputs' dtype before the product.

    Shazeer 2020, https://arxiv.org/abs/2002.05202, section 2. Both have one shape and dtype.
    """
    if gate.device.type in FUSED_DEVICES:
        from quantkernels.forward import fused

        return fused.silu_product(gate, up)
    return reference.silu_product(gate, up)
