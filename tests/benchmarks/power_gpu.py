"""What a GPU's clock and power are while one kernel multiplies without a pause.

    python -m tests.benchmarks.power_gpu --shapes 28672x4096 --tokens 64 512 2048

Each of linear_gpu.py's kernels runs for --seconds twice; of the second time are the microseconds of
a product, and medians of what nvidia-smi says meanwhile. Where the power is what the GPU may have
at most (it is printed), a kernel's speed hangs on the work's energy: less of it is a faster clock.
"""

import argparse
import copy
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from statistics import median

import torch
from quantkernels.arrivals import forget
from torch import Tensor

from tests.benchmarks import arguments
from tests.benchmarks.linear_kernels import BF16, OURS, Kernel, named
from tests.benchmarks.linear_peers import peers
from tests.benchmarks.linear_timing import Replay, copies, prepared

ASKED = ("clocks.sm", "power.draw.instant", "clocks.max.sm", "power.limit")
SMI = ("nvidia-smi", f"--query-gpu={','.join(ASKED)}", "--format=csv,noheader,nounits")
EVERY_MS = 20


@torch.no_grad()
def main(given: Sequence[str] | None = None) -> None:
    options = _options(given)
    wanted = named(options.kernels, [*OURS, *peers("cuda")[0]])
    print(torch.cuda.get_device_name())
    print(
        f"{'rows x columns':16}{'tokens':>7}  {'kernel':30}{'us':>9}{'MHz':>7}{'W':>6}{'most':>13}"
    )
    for rows, columns in options.shapes:
        w_OI = torch.randn(rows, columns, device="cuda").mul_(0.02).bfloat16()
        for tokens in options.tokens:
            x_TI = torch.randn(tokens, columns, device="cuda").bfloat16()
            for kernel in (BF16, *wanted):
                told = _told(_replay(kernel, w_OI, x_TI), options.seconds)
                print(f"{f'{rows} x {columns}':16}{tokens:7}  {kernel.label:30}{told}", flush=True)
                forget()  # the graph is not replayed again


def _replay(kernel: Kernel, w_OI: Tensor, x_TI: Tensor) -> Replay:
    built = kernel.build(w_OI)
    others = (copy.deepcopy(built.multiply) for _ in range(copies(built.num_bytes, "cuda") - 1))
    calls = [partial(multiply, x_TI) for multiply in (built.multiply, *others)]
    for call in calls:
        call()
    return prepared(calls, "cuda")


def _told(replay: Replay, seconds: float) -> str:
    once_us = replay(2)[-1] * len(replay.calls)
    count = int(seconds * 1e6 / once_us) + 1
    with _watched() as readings:
        replay(count)
        taken_us = median(replay(count))
    later = readings[(len(readings) + 1) // 2 :]
    if not later:
        raise SystemExit("nvidia-smi said nothing meanwhile: give --seconds more")
    clock, power, most_clock, most_power = map(median, zip(*later, strict=True))
    return f"{taken_us:9.1f}{clock:7.0f}{power:6.0f}{f'{most_clock:.0f}, {most_power:.0f}':>13}"


@contextmanager
def _watched() -> Iterator[list[tuple[float, ...]]]:
    """What nvidia-smi says till the end, of the first GPU."""
    readings: list[tuple[float, ...]] = []
    command = [*SMI, "--id=0", f"--loop-ms={EVERY_MS}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()  # it has begun
        try:
            yield readings
        finally:
            process.terminate()
        readings += [tuple(map(float, line.split(","))) for line in process.stdout if "\n" in line]


def _options(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shapes", type=arguments.shape, nargs="+", default=[(28672, 4096)], metavar="ROWSxCOLUMNS"
    )
    parser.add_argument("--tokens", type=arguments.count, nargs="+", default=[64, 512, 2048])
    parser.add_argument(
        "--kernels",
        nargs="+",
        default=["ours int4 g128", "ours int8"],
        help="parts of names; bf16 always runs",
    )
    parser.add_argument("--seconds", type=float, default=0.5)
    options = parser.parse_args(given)
    if not torch.cuda.is_available():
        parser.error("there is no CUDA GPU here")
    return options


if __name__ == "__main__":
    main()
