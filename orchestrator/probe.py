"""The worst block tried out on one worker before a job begins, and what that says of the job."""

from collections.abc import Mapping
from typing import Any

from orchestrator.checks import Prepared
from orchestrator.costs import block_seconds, solve_seconds
from orchestrator.phases import block_peak, received_bytes
from orchestrator.pieces import pieces_of
from orchestrator.sizes import Sizes
from orchestrator.units import gib
from quantcore.errors import ResourceError
from workers.tasks import Probe

_CHUNKS = 2  # the least that shows how sums are put together


def probe_task(prepared: Prepared) -> Probe:
    """The block that needs most, of equal ones the first; of it, the widest LinearGroup."""
    plan, sizes = prepared.plan, _sizes(prepared)
    calibrated = (i for i, b in enumerate(plan.blocks) if any(g.quantized() for g in b.groups))
    block = max(calibrated, key=lambda index: (block_peak(sizes, index), -index))
    groups = plan.blocks[block].groups
    quantized = [number for number, group in enumerate(groups) if group.quantized()]
    widest = max(quantized, key=lambda number: (groups[number].in_features, -number))
    pieces = pieces_of(plan, groups, sizes.hands)[widest]
    chunks = tuple(range(min(_CHUNKS, plan.contract.chunks)))
    return Probe(block, chunks, widest, max(pieces, key=len))


def scaled(prepared: Prepared, task: Probe, measured: Mapping[str, Any]) -> dict[str, Any]:
    """What the probe comes to for the whole job.

    Memory: each step's peak with what the probe did without, by its size: the worker's other
    chunks, the other nodes of its sums, the sums of other workers. Seconds: those of a block, as
    the probe measured them, in proportion to what was predicted for it.
    """
    prediction = prepared.prediction
    told = {"host": prediction.host, "device": prediction.device}
    sizes = _sizes(prepared)
    states = (sizes.share - len(task.chunks)) * sizes.chunk
    group = prepared.plan.blocks[task.block].groups[task.group]
    nodes = max(0, sizes.nodes_growing - len(task.chunks))
    square = 4 * group.in_features**2
    missing = {
        "collect": nodes * sizes.squares(task.block),
        "solve": max(0, received_bytes(sizes, group) - square),
    }
    place = "host" if prepared.device == "cpu" else "device"
    found = {}
    for where in ("host", "device"):
        if where not in measured["peaks"]["collect"]:
            continue
        peaks = {
            step: peaks[where] + (missing.get(step, 0) if where == place else 0)
            for step, peaks in measured["peaks"].items()
        }
        step = max(peaks, key=lambda step: peaks[step])
        others = states if where == prediction.states_on else 0
        found[where] = {
            "predicted": max(sum(told[where].get(tried, {}).values()) for tried in peaks),
            "measured": max(peaks[where] for peaks in measured["peaks"].values()),
            "scaled": peaks[step] + others,
            "step": step,
        }
    return {
        "block": task.block,
        "chunks": len(task.chunks),
        "bytes": found,
        "device_room": measured["device_room"],
        "seconds": {step: round(s, 3) for step, s in measured["seconds"].items()},
        "quantize_seconds": _quantize_seconds(prepared, sizes, task, measured["seconds"]),
        "fallback": measured["fallback"],
    }


def refuse_misfit(prepared: Prepared, probed: Mapping[str, Any]) -> None:
    """Raise ResourceError if the job would not fit by what was measured."""
    rooms = {"host": prepared.admitted.room, "device": probed["device_room"]}
    allowed = prepared.spec.workers.memory_bytes()
    if allowed is not None:
        rooms["host"] = min(rooms["host"], allowed)
    for place, need in probed["bytes"].items():
        if rooms[place] is not None and need["scaled"] > rooms[place]:
            calibration = prepared.spec.calibration
            assert calibration is not None
            instead = f"calibration.length below {calibration.length}, or fewer workers"
            raise ResourceError(
                f"workers.probe: block {probed['block']} took {gib(need['measured'])} of {place} "
                f"memory to {need['step']}, which comes to {gib(need['scaled'])} for the job, and "
                f"a worker has {gib(rooms[place])}: write {instead}"
            )


def _quantize_seconds(
    prepared: Prepared, sizes: Sizes, task: Probe, took: Mapping[str, float]
) -> dict[str, float]:
    rates, predicted = prepared.prediction.rates, prepared.prediction.seconds["quantize"]
    group = prepared.plan.blocks[task.block].groups[task.group]
    expected = block_seconds(sizes, rates, task.block)
    chunks = -(-prepared.plan.contract.chunks // sizes.hands) / len(task.chunks)
    solves = expected["solve"] / solve_seconds(sizes, rates, group)
    seen = took["load"] + took["collect"] * chunks + took["advance"] * chunks
    seen += took["solve"] * solves + 2 * expected["publish"]  # packed, and read again
    factor = seen / sum(expected.values())
    return {"predicted": round(predicted, 1), "scaled": round(predicted * factor, 1)}


def _sizes(prepared: Prepared) -> Sizes:
    spec, plan, architecture = prepared.spec, prepared.plan, prepared.architecture
    return Sizes(spec, plan, architecture, prepared.source, prepared.workers)
