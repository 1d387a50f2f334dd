"""What a job moves and how long it takes: estimates, from operations and bytes over rates.

Rates of a CPU are measured where the machine is looked at; those of GPUs come from a table. They
assume that nobody else uses the machine, that the model is read at the usual speed of a disk, or
of a slow network, and no losses. Tasks of lm-eval are left out: how long they are is not known
before. The probe (workers.probe) puts measured figures in their place.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from orchestrator.block import band_count
from orchestrator.sizes import FLOAT32, Sizes, weights_of
from workers.plan import SAMPLE_TOKENS, GroupPlan, LayerPlan

_READ_BYTES_PER_S = 250e6  # of weights, hashed or turned into the compute dtype, by one worker
_FETCHED_BYTES_PER_S = 110e6  # of a remote model, by one worker: a gigabit a second
_PACKED_WEIGHTS_PER_S = 1e8  # codes to a file's bytes and back, by one worker
_START_S = 15.0  # Ray and its workers
_CHARACTERS_PER_TOKEN = 3.5
_SECONDS_OF_AN_EVALUATION = 10.0  # beside its products: libraries, loading

# name in the device's own: operations a second in bfloat16 or float16, and in float32
_TABLE = {
    "B200": (1600e12, 70e12),
    "H200": (800e12, 50e12),
    "H100": (700e12, 50e12),
    "A100": (250e12, 18e12),
    "L40": (180e12, 60e12),
    "4090": (160e12, 70e12),
    "A10": (70e12, 20e12),
    "V100": (90e12, 14e12),
    "T4": (40e12, 6e12),
}
_UNKNOWN_DEVICE = (40e12, 8e12)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Of one worker."""

    forward: float  # operations a second in the compute dtype
    float32: float  # the same in float32: solves
    gram: float  # of Hessians, of which the lower triangle alone is counted
    column_s: float  # seconds for a column of a row tile, beside its products
    weight_s: float  # seconds for a weight whose range is searched
    fit_s: float  # seconds for a weight in one of HQQ's iterations
    said: str  # where these come from


def rates_of(kind: dict[str, str], dtype: str, threads: int, flops: dict[str, float]) -> Rates:
    if kind["device"] != "cpu":
        name = next((known for known in _TABLE if known in kind["name"]), None)
        half, single = _TABLE[name] if name else _UNKNOWN_DEVICE
        forward = single if dtype == "float32" else half
        said = f"a table's rates for {name}" if name else f"{kind['name']} taken for a slow GPU"
        return Rates(
            forward=0.5 * forward,
            float32=0.5 * single,
            gram=0.5 * forward,
            column_s=5e-7,
            weight_s=2e-11,
            fit_s=2e-10,
            said=said,
        )
    speed = 0.7 * threads  # of a lone product on one core
    single = flops.get("float32", 5e10)
    return Rates(
        forward=speed * flops.get(dtype, single),
        float32=speed * single,
        gram=speed * single * (2 if dtype == "bfloat16" else 1),
        column_s=5e-5,
        weight_s=1e-7 / threads,
        fit_s=1.5e-8 / threads,
        said=f"{single / 1e9:.0f} GFLOP/s measured on one core in float32",
    )


def seconds(sizes: Sizes, rates: Rates) -> dict[str, float]:
    """Of a whole job, by phase."""
    plan, workers = sizes.plan, sizes.workers
    phases = {"start": _START_S, "survey": sizes.model / _read_rate(sizes) / workers}
    blocks = range(len(plan.blocks))
    if plan.calibration is None:
        times = 1 if sizes.source.remote else 3
        read_s = times * sum(sizes.block_stored(index) for index in blocks) / _read_rate(sizes)
        pack_s = sum(weights_of(block) for block in plan.blocks) / _PACKED_WEIGHTS_PER_S
        fit_s = fit_seconds(sizes, rates, plan.layers())
        phases["quantize"] = (read_s + pack_s + fit_s) / min(workers, len(blocks))
    elif plan.statistics:
        each_block = (sum(block_seconds(sizes, rates, index).values()) for index in blocks)
        phases["quantize"] = sum(each_block) / min(workers, len(blocks))
    else:
        runs = [range(first, last) for first, last in plan.shard_ranges()]
        rounds = -(-plan.shards // workers)  # shards that one worker does one after the other
        each = [block_seconds(sizes, rates, index) for index in blocks]
        longest = max(sum(sum(each[index].values()) for index in run) for run in runs)
        shown = sum(each[index]["advance"] for index in blocks) if plan.shards > 1 else 0.0
        embed = sizes.outside / _read_rate(sizes)
        phases["quantize"] = embed + rounds * longest + shown
    spec = sizes.spec.evaluation
    if spec is not None:
        variants = len(spec.baselines) + 1
        tokens = spec.max_characters / _CHARACTERS_PER_TOKEN if spec.text is not None else 0.0
        item = sizes.evaluation_item
        rate = rates.float32 if item == FLOAT32 else rates.forward
        each_s = 2 * tokens * sizes.model_computing / item / rate
        each_s += 3 * sizes.model / _read_rate(sizes) + _SECONDS_OF_AN_EVALUATION
        phases["evaluate"] = each_s * -(-variants // workers)
    return phases


def block_seconds(sizes: Sizes, rates: Rates, index: int) -> dict[str, float]:
    """One block, by step, of as many workers as a shard has."""
    plan = sizes.plan
    block = plan.blocks[index]
    tokens = sizes.tokens * -(-plan.contract.chunks // sizes.hands) / plan.contract.chunks
    weights = weights_of(block)
    calibration = plan.calibration
    assert calibration is not None
    attention = 4 * calibration.length * sizes.architecture.hidden_size
    forward = tokens * (2 * weights + attention) / rates.forward
    read = sizes.block_stored(index) / _read_rate(sizes)
    quantized = [group for group in block.groups if group.quantized()]
    summed = sum(group.in_features**2 for group in block.groups if plan.summed(group))
    grams = tokens * summed / rates.gram
    steps = {
        "collect": forward + grams,
        "solve": sum(solve_seconds(sizes, rates, group) for group in quantized),
        "publish": weights / _PACKED_WEIGHTS_PER_S,
        "advance": weights / _PACKED_WEIGHTS_PER_S + forward,
    }
    if sizes.source.remote and not plan.statistics:  # read ahead while the block before it is done
        read = max(0.0, read - sum(steps.values()))
    steps["collect"] += read
    return steps


def _read_rate(sizes: Sizes) -> float:
    return _FETCHED_BYTES_PER_S if sizes.source.remote else _READ_BYTES_PER_S


def solve_seconds(sizes: Sizes, rates: Rates, group: GroupPlan) -> float:
    """One LinearGroup, of the hand that has most of its tiles: a factorization, then the rows."""
    rows = sum(layer.out_features for layer in group.quantized())
    tiles = sum(len(sizes.plan.row_tiles(stack)) for stack in group.stacks())
    mine = -(-tiles // sizes.hands)
    part = rows * mine / max(tiles, 1)
    width = float(group.in_features)
    fit_s = fit_seconds(sizes, rates, group.layers) * mine / max(tiles, 1)
    if not sizes.plan.summed(group):
        tries = sizes.plan.alphas_tried(group)
        return fit_s + tries * (2 * SAMPLE_TOKENS * rows * width / rates.float32)
    products = (width**3 + 6 * part * width**2) / rates.float32
    return fit_s + products + mine * width * rates.column_s + part * width * rates.weight_s


def fit_seconds(sizes: Sizes, rates: Rates, layers: Iterable[LayerPlan]) -> float:
    """HQQ's iterations over those of the linears that are its."""
    plan = sizes.plan
    mine = [layer for layer in layers if layer.scheme and plan.rounding(layer) == "hqq"]
    weights = sum(layer.out_features * layer.in_features for layer in mine)
    return weights * (plan.hqq.iterations + 1) * rates.fit_s


def network_bytes(sizes: Sizes, keeps: bool) -> dict[str, int]:
    """Bytes of a whole job, each as often as they are read or sent, wherever they come from."""
    plan, workers = sizes.plan, sizes.workers
    blocks = range(len(plan.blocks))
    survey = sizes.model
    evaluations = 0
    if sizes.spec.evaluation is not None:
        evaluations = len(sizes.spec.evaluation.baselines) * sizes.model
    published = {"to the store": sizes.artifact + sizes.statistics}
    if plan.calibration is None:
        read = survey + (1 if sizes.source.remote else 2) * sizes.model + evaluations
        from_store = sizes.artifact if sizes.spec.evaluation is not None else 0
        return {"of the model": read, **published, "from the store": from_store}
    hands, all_blocks = sizes.hands, sum(sizes.block_stored(index) for index in blocks)
    # to collect by everyone, to solve by everyone, to publish by one; a remote one all at once
    times = hands if sizes.source.remote else 2 * hands + 1
    read = survey + times * all_blocks + (workers + 1) * sizes.outside + evaluations
    if plan.shards > 1:
        read += hands * all_blocks
    readers = hands * sum(sizes.block_published(index) for index in blocks)
    if sizes.spec.evaluation is not None:
        readers += sizes.artifact
    parts = {"of the model": read, **published, "from the store": readers}
    moved = 0
    for index in blocks if hands > 1 else ():
        for group in plan.blocks[index].groups:
            if plan.summed(group):
                size = sizes.group_bands(group)
                wide = band_count(group.in_features, hands) > 1
                moved += (sizes.nodes + hands) * size if wide else hands * sizes.nodes * size
    parts["moments"] = moved
    parts["codes"] = sum(weights_of(plan.blocks[index]) for index in blocks)
    parts["token ids"] = workers * FLOAT32 * sizes.tokens
    if plan.shards > 1:
        parts["boundaries"] = (plan.shards - 1) * plan.contract.chunks * sizes.chunk
    if keeps:  # once at least for each shard
        parts["kept states"] = plan.shards * plan.contract.chunks * sizes.chunk
    return parts
