"""One worker against two on one machine, beside what the fleet simulation says of the two.

    python -m tests.benchmarks.scaling --model FOLDER --calibration FILE --sequences 32

The same job runs on an embedded Ray with one worker of one thread, then with two. The first run's
seconds per task are what the simulation is given; its prediction for two workers stands beside the
second run. Both artifacts must be the same to the bit.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import yaml

from orchestrator.checks import check
from orchestrator.driver import chunk_bytes, run_job
from orchestrator.loop import Observer
from orchestrator.site import Site
from tests.benchmarks.simulate import Costs, Simulation

MEMORY_BANDWIDTH = 4e9  # bytes a second from one process to another through shared memory


def run(folder: Path, options: argparse.Namespace, workers: int) -> tuple[Any, dict[str, Any]]:
    job = {
        "name": f"workers-{workers}",
        "model": {"path": str(options.model.absolute())},
        "quantization": {"scheme": "int4", "group_size": 64},
        "calibration": {
            "text": str(options.calibration.absolute()),
            "sequences": options.sequences,
            "length": 512,
            "shards": options.shards,
        },
        "workers": {"count": workers},
        "output": {"store": "store"},
    }
    path = folder / f"workers-{workers}.yaml"
    path.write_text(yaml.safe_dump(job))
    prepared = check(path)
    result = run_job(prepared, lambda plan: Site().start_workers(plan, prepared), Observer())
    return prepared, result.report


def costs_of(prepared: Any, report: dict[str, Any]) -> Costs:
    """Seconds of one chunk or one block, from a run on one worker."""
    tasks, chunks = report["task_seconds"], prepared.plan.contract.chunks
    blocks = len(prepared.plan.blocks)

    def each(kind: str, count: int) -> float:
        return float(tasks[kind]["total"]) / count

    return Costs(
        embed_s=each("embed", chunks),
        collect_s=each("collect", blocks * chunks),
        advance_s=each("advance", (blocks - prepared.plan.shards) * chunks),
        solve_s=each("solve", blocks),
        publish_s=each("publish", blocks),
        chunk_bytes=chunk_bytes(prepared),
        bandwidth=MEMORY_BANDWIDTH,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--shards", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        prepared, one = run(folder, options, 1)
        _, two = run(folder, options, 2)
        models = [
            {p.name: p.read_bytes() for p in (folder / f"store/workers-{n}/model").iterdir()}
            for n in (1, 2)
        ]
    assert models[0] == models[1], "two workers gave other bytes than one"
    costs = costs_of(prepared, one)
    predicted = {n: Simulation(prepared.plan, costs, n).run() for n in (1, 2)}
    measured = {1: one["seconds"]["quantize"], 2: two["seconds"]["quantize"]}
    print(
        json.dumps(
            {
                "sequences": options.sequences,
                "shards": options.shards,
                "measured_s": measured,
                "efficiency": measured[1] / measured[2] / 2,
                "predicted_s": predicted,
                "predicted_efficiency": predicted[1] / predicted[2] / 2,
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
