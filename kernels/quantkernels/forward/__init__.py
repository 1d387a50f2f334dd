"""Parts of a decoder block's forward that are bound by memory, each in one pass over it.

Norms, rotations and gated products round where transformers' own modules do: results differ in the
order of one sum alone.
"""

from typing import Literal

import torch
from torch import Tensor

from quantkernels.forward import operators, reference

FUSED_DEVICES = ("cuda", "xpu")

# Of RMS norms: (x / rms) in x's dtype times the weight, or (x / rms) (1 + weight) in float32
NormForm = Literal["scale", "offset"]

_ATTENDED = (torch.bfloat16, torch.float16, torch.float32)
_MOST_VALUES = 256  # of a head: what a program keeps in registers
_MOST_SHARING = 128  # bytes of one value of all query heads that have one head of keys

__all__ = ["NormForm", "attended", "attends", "rms_norm", "rotated", "silu_product"]


def attends(q_BHTD: Tensor, k_BGLD: Tensor, v_BGLD: Tensor, mask: Tensor | None) -> bool:
    """Whether `attended` takes these: told by shapes, dtypes and devices alone."""
    if not q_BHTD.ndim == k_BGLD.ndim == 4 or k_BGLD.shape != v_BGLD.shape:
        return False
    sequences, heads, tokens, values = q_BHTD.shape
    groups, length = k_BGLD.shape[1:3]
    dtypes = {q_BHTD.dtype, k_BGLD.dtype, v_BGLD.dtype}
    devices = {q_BHTD.device, k_BGLD.device, v_BGLD.device}
    fits = tokens == 1 and length > 0 and (k_BGLD.shape[0], k_BGLD.shape[3]) == (sequences, values)
    small = values <= _MOST_VALUES and heads // groups * q_BHTD.element_size() <= _MOST_SHARING
    if not fits or not small or heads % groups or q_BHTD.dtype not in _ATTENDED:
        return False
    if mask is not None:
        if mask.dtype not in (torch.bool, *_ATTENDED) or mask.ndim != 4:
            return False
        fits = mask.shape[0] in (1, sequences) and mask.shape[1:] == (1, 1, length)
        devices.add(mask.device)
    return fits and len(dtypes) == len(devices) == 1


def attended(
    q_BHTD: Tensor, k_BGLD: Tensor, v_BGLD: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    """softmax(scale q k^T + mask) v of one new token of each sequence: (B, T, H, D), T = 1.

    Vaswani et al. 2017, https://arxiv.org/abs/1706.03762, section 3.2.1; query heads share heads
    of keys in their order (Ainslie et al. 2023, https://arxiv.org/abs/2305.13245). Queries of B
    sequences and H heads, keys and values of G heads and L places, any strides; the mask is
    (B or 1, 1, 1, L): boolean, true where a place counts, or added, -inf where it does not. What
    stands in places that do not count is not multiplied in, be it NaN; where none counts, the
    result is 0. Softmax and sums are float32, and products those of q's dtype, bfloat16, float16
    or float32. Needs what `attends` says.
    """
    assert attends(q_BHTD, k_BGLD, v_BGLD, mask)
    if q_BHTD.device.type in FUSED_DEVICES:
        return operators.attended(q_BHTD, k_BGLD, v_BGLD, mask, scale)
    return reference.attended(q_BHTD, k_BGLD, v_BGLD, mask, scale)


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
