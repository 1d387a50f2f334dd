"""How much memory a worker will need, told before it starts.

An estimate from shapes alone, meant to err upwards: the interpreter with torch loaded, one block
with its stored copy, the stack of Hessian sums, the calibration activations, one micro-batch's
forward, and for an evaluation the whole model with one window of logits.
"""

import math

import torch

from jobs.spec import JobSpec
from workers.architecture import Architecture
from workers.plan import BlockPlan, Plan
from workers.sources import ModelSource

_INTERPRETER_BYTES = 900 * 2**20
_FLOAT32 = 4


def worker_bytes(
    spec: JobSpec, plan: Plan, architecture: Architecture, source: ModelSource
) -> dict[str, int]:
    """Predicted bytes of one worker's parts at its peak; their sum is the peak."""
    parts = {"interpreter": _INTERPRETER_BYTES}
    if plan.calibration is not None:
        parts |= _calibration(plan, architecture)
    else:
        parts["block"] = 3 * _FLOAT32 * max(map(_weights, plan.blocks))
    if spec.evaluation is not None:
        itemsize = getattr(torch, spec.compute_dtype).itemsize
        whole = sum(math.prod(info.shape) for info in source.tensors.values()) * itemsize
        logits = 3 * _FLOAT32 * spec.evaluation.length * architecture.vocabulary
        working = sum(parts.values()) - _INTERPRETER_BYTES
        if 2 * whole + logits > working:  # one after the other, so the larger counts
            return {"interpreter": _INTERPRETER_BYTES, "evaluation": 2 * whole + logits}
    return parts


def _calibration(plan: Plan, architecture: Architecture) -> dict[str, int]:
    assert plan.calibration is not None
    itemsize = plan.torch_dtype.itemsize
    tokens = plan.calibration.sequences * plan.calibration.length
    batch_tokens = plan.contract.micro_batch * plan.calibration.length
    levels = plan.contract.chunks.bit_length() + 1
    widest = 0
    hessians = 0
    for block in plan.blocks:
        squares = [group.in_features**2 for group in block.groups]
        hessians = max(hessians, sum(squares) * _FLOAT32 * levels)
        rows = [layer.out_features for group in block.groups for layer in group.layers]
        widest = max([widest, *rows])
    square = max(g.in_features for b in plan.blocks for g in b.groups) ** 2
    return {
        "block": 3 * _FLOAT32 * max(map(_weights, plan.blocks)),
        "hessians": hessians + 4 * square * _FLOAT32,
        "activations": tokens * architecture.hidden_size * itemsize,
        "forward": 6 * batch_tokens * widest * itemsize,
        "embeddings": 2 * architecture.vocabulary * architecture.hidden_size * itemsize,
    }


def _weights(block: BlockPlan) -> int:
    return sum(layer.out_features * layer.in_features for g in block.groups for layer in g.layers)
