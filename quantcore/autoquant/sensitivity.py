"""How far a scheme moves a linear's outputs, on a sample of what the linear was handed.

    error = mean over tokens x of  |Q x' - W x|^2 / |W x|^2

in float32, with Q the weight as it is stored and x' the input as the scheme serves it. Each token
counts alike: a model's first token may be a thousand times as large as others, and decide alone.
Layouts of one scheme have one error; what a kernel rounds in its sums is not in it.

Shape suffixes: O = out_features, I = in_features, S = tokens of the sample.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from quantcore.activations import fake_quantize
from quantcore.errors import QuantizationError
from quantcore.methods import METHODS, Options, Readers
from quantcore.recorder import InputStatistics
from quantcore.schemes import Scheme
from quantcore.tensors import QuantizedTensor


def output_errors(
    name: str, w_OI: Tensor, statistics: InputStatistics, schemes: Iterable[Scheme]
) -> dict[Scheme, float]:
    """Of plain rounding. The statistics have ranges, whose sample is what errors are of."""
    assert statistics.ranges is not None
    x_SI = statistics.ranges.sample_SI
    y_SO = x_SI @ w_OI.float().t()
    norm_S = y_SO.square().sum(1)
    seen_S = norm_S > 0
    if not seen_S.any():
        raise QuantizationError(
            f"'{name}' gave nothing but zeros for what was recorded: record other inputs, or leave "
            "it out: by filter, in a job by an override with skip: true"
        )
    errors = {}
    for scheme in schemes:
        q_OI, input_scale = _rounded(name, w_OI, statistics, scheme)
        off_SO = fake_quantize(x_SI, scheme, input_scale) @ q_OI.t() - y_SO
        errors[scheme] = (off_SO.square().sum(1) / norm_S)[seen_S].mean().item()
    return errors


def _rounded(
    name: str, w_OI: Tensor, statistics: InputStatistics, scheme: Scheme
) -> tuple[Tensor, Tensor | None]:
    readers = Readers({name: w_OI.detach()}, scheme, statistics)
    with torch.no_grad():
        codes = METHODS["rtn"].run(readers, Options()).linears[name]
        weight = QuantizedTensor.of(codes, w_OI.dtype)
        return weight.read_back(), weight.input_scale
