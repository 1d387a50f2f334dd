"""Moments of a block's inputs: hooks on its linears add what they are handed to trees of sums."""

import contextlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from quantcore.moments import MomentTree, band_rows
from workers.blocks import Inputs, linears_of, run_block
from workers.plan import BlockPlan
from workers.tasks import BandMoments


class _AllSeenError(Exception):
    """The last LinearGroup has seen its input: the rest of the block's forward is not needed."""


class Collector:
    """Hooks on the first linear of each LinearGroup that has something to quantize."""

    def __init__(
        self, block: nn.Module, prefix: str, plan: BlockPlan, chunks: int, device: torch.device
    ) -> None:
        self._block = block
        self._chunk = 0
        self._trees = [
            MomentTree(chunks, group.in_features, device) if group.quantized() else None
            for group in plan.groups
        ]
        modules = {prefix + name: module for name, module in linears_of(block)}
        watched = [index for index, tree in enumerate(self._trees) if tree is not None]
        for index in watched:
            first = modules[plan.groups[index].layers[0].name]
            first.register_forward_pre_hook(self._hook(index, last=index == watched[-1]))

    def run(self, chunk: int, index: int, batches: Iterable[Inputs]) -> None:
        """Run one chunk through the block, whose number is `index`; chunks come in rising order."""
        self._chunk = chunk
        for inputs in batches:
            with contextlib.suppress(_AllSeenError):
                run_block(self._block, inputs.calls[index], inputs.hidden_BLH)

    def parts(self, bands: tuple[int, ...]) -> tuple[BandMoments, ...]:
        """What was summed up, each LinearGroup in its number of row bands."""
        parts: list[BandMoments] = []
        for tree, count in zip(self._trees, bands, strict=True):
            if tree is None:
                parts += [BandMoments(0, {})] * count
                continue
            tree.close()
            for first, last in band_rows(tree.width, count):
                nodes = {
                    span: (
                        moments.sum_II[first:last, :last].cpu().numpy(),
                        moments.tokens,
                        moments.dropped,
                    )
                    for span, moments in tree.nodes.items()
                }
                parts.append(BandMoments(first, nodes))
        return tuple(parts)

    def _hook(self, index: int, last: bool) -> Any:
        def add(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            tree = self._trees[index]
            assert tree is not None
            tree.add(self._chunk, args[0].flatten(0, -2))
            if last:
                raise _AllSeenError

        return add
