"""The search itself: compile in many processes, hold to the dense product, time, keep the best."""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import redirect_stdout, suppress
from functools import partial
from io import StringIO
from itertools import chain
from operator import itemgetter
from statistics import median
from typing import Any

import torch
from torch.nn.functional import linear
from triton.runtime.errors import OutOfResources, PTXASError

from quantkernels.choice import FEW
from quantkernels.launches import OTHER, Codes, Kernel, Launch, Shape, Tuned
from quantkernels.tune.subjects import SUBJECTS, candidates, familiar
from quantkernels.tune.timing import timed

Of = tuple[Kernel, Codes, int]  # and the size of a group, 0 for whole rows
CACHE_BYTES = 128 << 20  # more than any cache so far
FAMILIAR = 25  # launches of other shapes, for many tokens
FINALISTS = 3  # that are timed again, for longer, beside what is no kernel of ours
FINAL_US = 150_000.0
# relative, of a product beside that of the values rounded to bfloat16
MOST_ERROR = {"weight_only": 1e-2, "w8a8": 2e-2}

Compiling = Sequence[Future[list[Launch]]]


def compiling(
    pool: ProcessPoolExecutor,
    shape: Shape,
    most: int,
    processes: int,
    known: Sequence[Tuned] | None = None,
) -> Compiling:
    """Begins to compile so many of the launches worth a try, the same ones each time.

    Where `known` is given, only what is best there of other shapes is worth one, and for many
    tokens only those that should end first.
    """
    hopper = torch.cuda.get_device_capability() == (9, 0)
    if known is None:
        launches = list(candidates(shape, _units(), hopper=hopper))
        random.Random(0).shuffle(launches)  # noqa: S311 - some of many
    else:
        launches = list(familiar(shape, known, _units()))
        most = min(most, FAMILIAR if shape.tokens >= FEW else most)
    launches.sort(key=lambda launch: not launch.other)  # which is never left out
    launches = launches[:most]
    return [pool.submit(_compile, shape, launches[n::processes]) for n in range(processes)]


def search(work: Mapping[Shape, Compiling]) -> Iterator[Tuned]:
    """The best launch of each; the shapes are of one weight."""
    first = next(iter(work))
    subject = SUBJECTS[first.kernel]
    weights: list[Any] = [subject.weight(first, "cuda")]
    while len(weights) < 2 or len(weights) * subject.bytes(weights[0]) < CACHE_BYTES:
        weights.append(subject.weight(first, "cuda"))
    dense_OI = subject.dense(weights[0])
    denses = [dense_OI.clone() for _ in range(max(2, CACHE_BYTES // dense_OI.nbytes + 1))]
    for shape, launches in work.items():
        inputs = subject.inputs(shape, "cuda")
        x_TI = subject.served(inputs)
        wanted_TO = linear(x_TI, dense_OI)

        def calls(launch: Launch, inputs: Any = inputs) -> list[Callable[[], object]]:
            return [partial(subject.run, launch, inputs, weight) for weight in weights]

        rough: list[tuple[float, Launch]] = []
        for launch in chain.from_iterable(future.result() for future in launches):
            with suppress(OutOfResources):  # more than a multiprocessor has
                y_TO = subject.run(launch, inputs, weights[0])
                if not (y_TO - wanted_TO).norm() < MOST_ERROR[shape.kernel] * wanted_TO.norm():
                    raise SystemExit(f"wrong: {launch} of {shape}")
                rough.append((median(timed(calls(launch), 5)), launch))
        rough.sort(key=itemgetter(0))
        finalists = [launch for _, launch in rough[:FINALISTS]]
        if any(launch.other for _, launch in rough):
            finalists = list(dict.fromkeys((*finalists, OTHER)))
        times = [(_at_length(calls(launch)), launch) for launch in finalists]
        time_us, best = min(times, key=itemgetter(0))
        dense_us = _at_length([partial(linear, x_TI, dense) for dense in denses])
        yield Tuned(
            shape=shape, launch=best, time_us=round(time_us, 2), dense_us=round(dense_us, 2)
        )


def _at_length(calls: Sequence[Callable[[], object]]) -> float:
    """A long run's median, without its beginning: where matrix units bind, a GPU slows down soon to
    keep to its power, and by another share for each kernel."""
    return median(timed(calls, least_us=FINAL_US))


def _units() -> int:
    return torch.cuda.get_device_properties().multi_processor_count


def _compile(shape: Shape, launches: Sequence[Launch]) -> list[Launch]:
    """Those that can be compiled: of some the assembler finds that registers do not suffice."""
    good: list[Launch] = []
    subject = SUBJECTS[shape.kernel]
    inputs, weight = subject.inputs(shape, "meta"), subject.weight(shape, "meta")
    for launch in launches:
        with suppress(OutOfResources, PTXASError), redirect_stdout(StringIO()):
            if not launch.other:
                subject.compile(launch, inputs, weight)
            good.append(launch)
    return good
