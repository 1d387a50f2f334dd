"""Statistics of a block's inputs: hooks on its linears add what they are handed to fixed trees."""

import contextlib
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from quantcore.moments import Moments, band_rows, moment_tree
from quantcore.ranges import Ranges, range_tree
from quantcore.tree import Tree
from workers.blocks import Inputs, linears_of, run_block
from workers.clock import Clock
from workers.plan import Plan
from workers.tasks import BandMoments, InputRanges


class _AllSeenError(Exception):
    """The last LinearGroup has seen its input: the rest of the block's forward is not needed."""


class Collector:
    """Hooks on the first linear of each LinearGroup that has something to quantize."""

    def __init__(
        self,
        block: nn.Module,
        prefix: str,
        plan: Plan,
        index: int,
        device: torch.device,
        clock: Clock,
    ) -> None:
        self._block = block
        self._index = index
        self._clock = clock
        self._chunk = 0
        self._real_T: Tensor | None = None
        self._sums: dict[int, Tree[Moments]] = {}  # by the group's number
        self._ranges: dict[int, Tree[Ranges]] = {}
        groups, chunks = plan.blocks[index].groups, plan.contract.chunks
        for number, group in enumerate(groups):
            if plan.summed(group):
                self._sums[number] = moment_tree(chunks, group.in_features, device)
            if plan.ranged(group):
                rows = plan.sample_rows()
                self._ranges[number] = range_tree(chunks, group.in_features, rows, device)
        modules = {prefix + name: module for name, module in linears_of(block)}
        watched = sorted({*self._sums, *self._ranges})
        for number in watched:
            first = modules[groups[number].layers[0].name]
            first.register_forward_pre_hook(self._hook(number, last=number == watched[-1]))

    def run(self, chunk: int, batches: Iterable[Inputs]) -> None:
        """Run one chunk through the block; chunks come in rising order."""
        self._chunk = chunk
        for inputs in batches:
            self._real_T = inputs.real_T
            with contextlib.suppress(_AllSeenError):
                run_block(self._block, inputs.calls[self._index], inputs.hidden_BLH)

    def parts(self, bands: tuple[int, ...]) -> tuple[BandMoments | InputRanges, ...]:
        """What was added up: each group's sums in its number of row bands, then all ranges."""
        parts: list[BandMoments | InputRanges] = []
        with self._clock.spent("hessian"):
            for number, sums in self._sums.items():
                sums.close()
                parts += _bands(sums, bands[number])
            for ranges in self._ranges.values():
                ranges.close()
                parts.append(_packed(ranges))
        return tuple(parts)

    def _hook(self, number: int, last: bool) -> Any:
        trees: list[Tree[Any]] = [
            trees[number] for trees in (self._sums, self._ranges) if number in trees
        ]

        # a strong reference would close a circle through the block, and keep its weights and all
        # sums until Python looks for such circles
        weak = weakref.ref(self)

        def add(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            collector = weak()
            assert collector is not None
            with collector._clock.spent("hessian"):
                x_TI = args[0].flatten(0, -2)
                if collector._real_T is not None:
                    x_TI = x_TI[collector._real_T]
                for tree in trees:
                    tree.add(collector._chunk, x_TI)
            if last:
                raise _AllSeenError

        return add


def _bands(sums: Tree[Moments], count: int) -> Iterator[BandMoments]:
    width = next(iter(sums.nodes.values())).sum_II.shape[0]
    for first, last in band_rows(width, count):
        nodes = {
            span: (
                moments.sum_II[first:last, :last],
                moments.tokens,
                moments.dropped,
            )
            for span, moments in sums.nodes.items()
        }
        yield BandMoments(first, nodes)


def _packed(ranges: Tree[Ranges]) -> InputRanges:
    return InputRanges(
        {
            span: (
                node.low_I,
                node.high_I,
                node.sample_SI,
                node.tokens,
                node.dropped,
            )
            for span, node in ranges.nodes.items()
        }
    )
