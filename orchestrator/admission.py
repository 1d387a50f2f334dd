"""What a job will need of a worker and of the fleet, told before anything starts.

From shapes alone, and meant to err upwards. Of a worker's memory the phase that needs most decides
(phases.py); costs.py has what is moved, and how long it takes.
"""

from dataclasses import dataclass

from orchestrator.costs import Rates, network_bytes, seconds
from orchestrator.phases import Parts, Phases, device_phases, host_phases, peak, received_bytes
from orchestrator.sizes import FLOAT32, Sizes, weights_of
from workers.plan import SAMPLE_TOKENS

_WAITING = ("hand-overs", "boundaries")  # may as well be spilled by Ray


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    workers: int
    states_on: str  # where hidden states wait between blocks: device, host or disk
    host: Phases  # of one worker
    device: Phases  # of one worker; none on the CPU
    object_store: Parts  # of the whole fleet at once
    reading: int  # of a worker from the object store, at most at once
    scratch: Parts  # of one worker, on disk
    store: Parts  # of the job
    network: Parts  # of the job, by the way it goes
    seconds: dict[str, float]  # of the job, by phase
    rates: Rates  # what the seconds are reckoned with

    @property
    def host_bytes(self) -> int:
        return peak(self.host)[1]

    @property
    def private_bytes(self) -> int:
        """Host memory of one worker without pages of the object store, which all share."""
        return max(
            sum(size for part, size in parts.items() if part != "shared objects")
            for parts in self.host.values()
        )

    @property
    def device_bytes(self) -> int:
        return peak(self.device)[1] if self.device else 0

    @property
    def objects(self) -> int:
        """What must stand in the object store; the rest may go to disk without harm."""
        return sum(size for part, size in self.object_store.items() if part not in _WAITING)


def predict(sizes: Sizes, states_on: str, rates: Rates, *, keeps: bool = False) -> Prediction:
    """`keeps` says whether hidden states are kept in the store from time to time."""
    on_device = sizes.plan.contract.kind["device"] != "cpu"
    return Prediction(
        workers=sizes.workers,
        states_on=states_on,
        host=host_phases(sizes, states_on),
        device=device_phases(sizes, states_on) if on_device else {},
        object_store=object_store(sizes),
        reading=_reading(sizes),
        scratch=_scratch(sizes, states_on),
        store=_store(sizes, keeps),
        network=network_bytes(sizes, keeps),
        seconds=seconds(sizes, rates),
        rates=rates,
    )


def _reading(sizes: Sizes) -> int:
    groups = (group for block in sizes.plan.blocks for group in block.groups if group.quantized())
    return max(received_bytes(sizes, group) for group in groups) if sizes.plan.calibration else 0


def object_store(sizes: Sizes) -> Parts:
    """What stands in the object stores at once, of all shards."""
    plan = sizes.plan
    if plan.calibration is None:
        return {"plan": 0}
    blocks = range(len(plan.blocks))
    sums = max(sizes.bands(index) for index in blocks)
    codes = max(2 * weights_of(plan.blocks[index]) for index in blocks)
    parts = {
        "plan": sizes.workers * FLOAT32 * sizes.tokens,
        "hessians": sizes.shards * (sizes.nodes + (sizes.hands > 1)) * sums,
        "codes": sizes.shards * codes,
    }
    if sizes.hands > 1:
        parts["hand-overs"] = sizes.shards * sizes.share * sizes.chunk
    if plan.shards > 1:
        parts["boundaries"] = (plan.shards - 1) * plan.contract.chunks * sizes.chunk
    return parts


def _scratch(sizes: Sizes, states_on: str) -> Parts:
    blocks = range(len(sizes.plan.blocks))
    files = [sizes.outside_published, *(sizes.block_published(index) for index in blocks)]
    if sizes.spec.evaluation is not None:
        files.append(sizes.artifact + 8 * sizes.spec.evaluation.max_characters)
    widest = max(g.in_features for block in sizes.plan.blocks for g in block.groups)
    if sizes.plan.keeps_statistics or sizes.plan.statistics:
        files.append(FLOAT32 * widest * (widest // 2 + 2 * SAMPLE_TOKENS))
    parts = {"files on their way": max(files)}
    if sizes.plan.calibration is not None:
        parts["files on their way"] = max(*files, sizes.chunk)
        if states_on == "disk":
            parts["hidden states"] = (sizes.share + 1) * sizes.chunk
    return parts


def _store(sizes: Sizes, keeps: bool) -> Parts:
    """Kept states stand there twice until the older ones are swept."""
    layers = sum(1 for _ in sizes.plan.layers())
    records = 2**20 + 4096 * layers + 8 * sizes.tokens
    parts = {"artifact": sizes.artifact + sizes.companions, "ledger": records}
    if sizes.spec.evaluation is not None:
        parts["ledger"] += 4 * sizes.spec.evaluation.max_characters
    if sizes.statistics:
        parts["statistics"] = sizes.statistics
    if keeps:
        parts["kept states"] = 2 * sizes.plan.shards * sizes.plan.contract.chunks * sizes.chunk
    return parts
