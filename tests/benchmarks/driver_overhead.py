"""What a task costs the driver besides its work: ten thousand tasks with nothing in them, on Ray.

    python -m tests.benchmarks.driver_overhead --tasks 10000 --workers 2

Told are milliseconds of the driver's processor time and of the clock for each task, and how much
the driver's memory grew from the first tenth of the tasks to the last.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import yaml

from orchestrator.bag import Bag
from orchestrator.checks import check
from orchestrator.loop import Observer, Timings, execute
from orchestrator.site import Site
from tests.conftest import TEXT, save_model
from workers.tasks import Drop, Task


class Meter(Observer):
    """The driver's memory after every so many tasks."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.count = 0
        self.resident: list[int] = []

    def finished(self, assignment: Any, result: Any) -> None:
        self.count += 1
        if self.count % self.every == 0:
            self.resident.append(psutil.Process().memory_info().rss)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        save_model("llama", folder / "model")
        (folder / "text.txt").write_text(TEXT)
        job = {
            "model": {"path": "model"},
            "quantization": {"scheme": "int4", "group_size": 32},
            "calibration": {"text": "text.txt", "sequences": 8, "length": 32},
            "workers": {"count": options.workers},
            "output": {"store": "store"},
        }
        (folder / "job.yaml").write_text(yaml.safe_dump(job))
        prepared = check(folder / "job.yaml")
        executor = Site().start_workers(prepared.plan, prepared)
        tasks: dict[str, Task] = {f"empty/{number}": Drop(()) for number in range(options.tasks)}
        meter = Meter(options.tasks // 10)
        try:
            execute([Bag({"warm/0": Drop(())})], executor, Observer(), Timings())
            wall, processor = time.perf_counter(), time.process_time()
            execute([Bag(tasks)], executor, meter, Timings())
            wall, processor = time.perf_counter() - wall, time.process_time() - processor
        finally:
            executor.close()
    print(
        json.dumps(
            {
                "tasks": options.tasks,
                "workers": options.workers,
                "driver_ms_per_task": processor * 1e3 / options.tasks,
                "wall_ms_per_task": wall * 1e3 / options.tasks,
                "resident_mb": [round(size / 1e6, 1) for size in meter.resident],
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
