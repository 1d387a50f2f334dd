"""What it costs that a block's hidden states wait on the device, on the host or on disk.

    python -m tests.benchmarks.spilled_states --sequences 512 --length 2048 --json OUT

A block of Llama-3.1-8B's widths (random weights, bfloat16) is run over all sequences in
micro-batches of 16,384 tokens: a pass that reads the states, as Collect does without its sums, and
one that also puts the outputs in their place, as Advance does. The same with copies that everything
waits for, in ordinary memory ("blocking"). Each row first shows that its outputs are the device's
to the bit; told are the median of the passes, and the bytes of states that a pass moves a second.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from tests.benchmarks.block_costs import SHAPES, VOCABULARY, save_random_model
from workers.blocks import BlockModel, Call, run_block
from workers.fusing import fuse
from workers.shelf import Shelf
from workers.sources import open_source

_TOKENS = 16384  # of a micro-batch


class Blocking:
    """What a shelf did before: each copy is waited for."""

    place = "host"

    def put(self, hidden_BLH: Tensor) -> Tensor:
        return hidden_BLH.cpu()

    def get(self, kept_BLH: Tensor, later_BLH: Tensor | None = None) -> Tensor:
        return kept_BLH.to("cuda")

    def settle(self) -> None: ...


class BlockingOnDisk(Blocking):
    def __init__(self) -> None:
        self._shelf = Shelf(torch.device("cpu"), "disk")

    def put(self, hidden_BLH: Tensor) -> Tensor:
        return self._shelf.put(hidden_BLH.cpu())


PLACES: dict[str, Any] = {
    "device": lambda: Shelf(torch.device("cuda"), "device"),
    "host": lambda: Shelf(torch.device("cuda"), "host"),
    "host, blocking": Blocking,
    "disk": lambda: Shelf(torch.device("cuda"), "disk"),
    "disk, blocking": BlockingOnDisk,
}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        save_random_model(Path(scratch), options.shape, 1, torch.bfloat16)
        model = BlockModel(open_source(Path(scratch)), torch.bfloat16, "cuda")
        block = model.block(0)
        fuse(block)
        height = max(1, _TOKENS // options.length)
        torch.manual_seed(0)
        ids_SL = torch.randint(VOCABULARY, (options.sequences, options.length))
        call = model.embed(ids_SL[:height]).calls[0]
        shape = (height, options.length, SHAPES[options.shape]["hidden_size"])
        count = options.sequences // height
        rows: list[dict[str, Any]] = []
        digest: Tensor | None = None
        for place, make in PLACES.items():
            shelf = make()
            states = [shelf.put(hidden_BLH) for hidden_BLH in _states(count, shape)]
            shelf.settle()
            row: dict[str, Any] = {"states on": place}
            for kind in ("read", "read and write"):
                times = []
                for number in range(options.passes + 1):
                    torch.cuda.synchronize()
                    start = time.perf_counter()
                    outputs = _run(shelf, states, block, call, put=kind != "read")
                    shelf.settle()
                    torch.cuda.synchronize()
                    times.append(time.perf_counter() - start)
                    if number == 0 and kind != "read":
                        digest = _held_to(digest, outputs, place)
                    del outputs
                row[f"{kind}, seconds"] = round(median(times[1:]), 4)
                moved = sum(t.nbytes for t in states) * (1 if kind == "read" else 2)
                row[f"{kind}, GB/s"] = round(moved / median(times[1:]) / 1e9, 1)
            rows.append(row)
            print(json.dumps(row), flush=True)
            del states, shelf
            torch.cuda.empty_cache()
    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "shape": options.shape,
        "sequences": options.sequences,
        "length": options.length,
        "micro_batches": count,
        "rows": rows,
    }


def _states(count: int, shape: tuple[int, ...]) -> Iterator[Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    for _ in range(count):
        yield torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)


def _run(shelf: Any, states: list[Tensor], block: Any, call: Call, *, put: bool) -> list[Tensor]:
    outputs = []
    for kept_BLH, later_BLH in zip(states, [*states[1:], None], strict=True):
        output_BLH = run_block(block, call, shelf.get(kept_BLH, later_BLH))
        if put:
            outputs.append(shelf.put(output_BLH))
    return outputs


def _held_to(digest: Tensor | None, outputs: list[Tensor], place: str) -> Tensor:
    """A sum over all bits, weighted by where they stand, of each micro-batch."""
    found = []
    for output_BLH in outputs:
        words = output_BLH.to("cuda").flatten().view(torch.int16).long()
        found.append((words * torch.arange(1, len(words) + 1, device="cuda")).sum())
    now = torch.stack(found)
    if digest is not None and not torch.equal(digest, now):
        raise SystemExit(f"the outputs of states on {place} are not those of states on the device")
    return now


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="llama-8b")
    parser.add_argument("--sequences", type=int, default=512)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--scratch", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results = measure(options)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
