"""What one worker holds at once, on the host and on its device, by phase of its work.

While it collects, solves, publishes, ...: from shapes alone, and meant to err upwards. Of blocks
the one with the most decides, for each phase by itself. Three places can hold the calibration's
hidden states between blocks (workers/shelf.py); what is told is for one.
"""

from collections.abc import Iterable, Mapping

from orchestrator.block import band_count
from orchestrator.calibration import MOST_WAITING
from orchestrator.sizes import FLOAT32, Sizes, weights_of
from orchestrator.units import GIB, MIB
from quantcore.hqq import CHUNK_OF_A_DEVICE
from workers.arena import SLAB_BYTES
from workers.decoding import is_step
from workers.plan import RUN_WEIGHTS, GroupPlan, Plan
from workers.sources import AHEAD_BYTES
from workers.transfers import MOST_SENT, PINNED_BYTES

Parts = dict[str, int]  # bytes by what they are for
Phases = dict[str, Parts]  # by what a worker is doing

_INTERPRETER = 900 * MIB  # Python with torch, transformers and Ray, and what malloc holds on to
_DRIVER_LIBRARIES = 2 * GIB  # what CUDA or XPU adds to it
_LIBRARIES_OF_EVALUATION = 320 * MIB
_CONTEXT = 768 * MIB  # of a device, with the workspaces of its libraries
_CRUMBS = 0.08  # of what is allocated, lost between allocations
# copies of one Hessian from its sums to a factor: its inverse's, or on an accelerator its own
_SQUARES_OF_A_SOLVE, _SQUARES_OF_A_ROOT = 11, 5
_COPIES_OF_A_TILE = 16  # of its float32 rows: ranges tried, codes, errors


def peak(phases: Mapping[str, Parts]) -> tuple[str, int]:
    """The phase that needs most, and how much."""
    phase = max(phases, key=lambda name: sum(phases[name].values()))
    return phase, sum(phases[phase].values())


def block_peak(sizes: Sizes, index: int) -> int:
    """What a block alone asks for: of blocks, the one with the most is the worst."""
    return max(sum(parts.values()) for parts in _block_phases(sizes, index).values())


def host_phases(sizes: Sizes, states_on: str) -> Phases:
    """One worker's host memory. Weights are read on the host, whatever computes."""
    on_device = sizes.plan.contract.kind["device"] != "cpu"
    always = {"interpreter": _INTERPRETER + on_device * _DRIVER_LIBRARIES}
    survey = max(sizes.model // (4 * sizes.workers), 1) + sizes.largest_tensor
    if sizes.source.remote:  # what was looked at is let go of, where a file's pages stay
        survey = min(survey, 2 * sizes.largest_tensor)
        always["in flight"] = AHEAD_BYTES  # of what a reader asks for, beside the tensor it is at
    phases: Phases = {
        "survey": {"source": survey, "working": 2 * sizes.largest_tensor},
        "outside": {"source": sizes.outside, "working": 2 * sizes.largest_tensor},
    }
    if sizes.plan.calibration is None:
        phases["round"] = max(
            (_rounding(sizes, index) for index in range(len(sizes.plan.blocks))), key=_total
        )
    else:
        if states_on == "host":
            always["hidden states"] = sizes.share * sizes.chunk
        if states_on == "disk":
            always["hidden states"] = sizes.chunk
        if on_device and states_on != "device":  # beside a chunk on its way through a block
            always["on their way"] = sizes.chunk + PINNED_BYTES
        phases |= _calibration_on_host(sizes, on_device)
    if sizes.spec.evaluation is not None:
        phases["evaluate"] = _evaluation(sizes, on_device)
    return {phase: always | _with_crumbs(parts) for phase, parts in phases.items()}


def _calibration_on_host(sizes: Sizes, on_device: bool) -> Phases:
    """Of the blocks, for each phase the one that needs most."""
    worst: Phases = {}
    for index in range(len(sizes.plan.blocks)):
        for phase, parts in _block_phases(sizes, index).items():
            if _total(parts) > _total(worst.get(phase, {})):
                worst[phase] = parts
    if on_device:  # where the products and the solves are, and most of what they hold
        there = ("products", "hessians", "solve")
        worst = {
            phase: {part: size for part, size in parts.items() if part not in there}
            for phase, parts in worst.items()
        }
        worst["collect"]["sent"] = worst["collect"]["shared objects"]
    embeddings = sizes.outside + _if_cast(sizes, sizes.outside_computing)
    return {"embed": {"embeddings": embeddings, "products": 4 * sizes.chunk}, **worst}


def _block_phases(sizes: Sizes, index: int) -> Phases:
    """What one block asks for while it is collected, solved, published and passed on."""
    ahead = sizes.read_ahead(index)
    block = sizes.block_stored(index) + _if_cast(sizes, sizes.block_computing(index))
    weights = weights_of(sizes.plan.blocks[index])
    decoded = FLOAT32 * weights + _if_cast(sizes, sizes.block_computing(index), FLOAT32)
    products = _products(sizes)
    sums = sizes.nodes_growing * sizes.squares(index) + sizes.widest(index)
    phases = {
        "collect": {
            "block": block,
            "hessians": sums,
            "products": products,
            "sent": sizes.widest(index),
            "shared objects": sizes.nodes_held * sizes.bands(index),
        },
        "solve": _solve(sizes, index),
        "publish": {
            # codes as they came, in one piece and as stored, beside what stays as it is
            "block": 4 * weights + sizes.block_stored(index) + 2 * sizes.block_published(index),
            "shared objects": 2 * weights,
        },
        "advance": {
            "block": sizes.block_published(index) + sizes.block_stored(index) + decoded,
            "products": products + sizes.chunk,
        },
    }
    if sizes.source.remote:  # held whole until the next one's turn
        phases["solve"]["block"] = phases["solve"].get("block", 0) + sizes.block_stored(index)
    if sizes.plan.shards > 1:
        first, last = next(pair for pair in sizes.plan.shard_ranges() if pair[0] <= index < pair[1])
        loaded = sum(sizes.block_computing(number) for number in range(first, last))
        phases["boundary"] = {
            "block": loaded + sizes.block_stored(index),
            "products": products + 3 * sizes.chunk,
            "shared objects": 2 * sizes.chunk,
        }
    return {p: parts | {"read ahead": ahead} for p, parts in phases.items()} if ahead else phases


def _solve(sizes: Sizes, index: int) -> Parts:
    """The LinearGroup of a block that takes most."""
    groups = [group for group in sizes.plan.blocks[index].groups if group.quantized()]
    on_device = sizes.plan.contract.kind["device"] != "cpu"
    copies = _SQUARES_OF_A_ROOT if on_device else _SQUARES_OF_A_SOLVE
    candidates: list[Parts] = [{}]
    for group in groups:
        rows = sum(layer.out_features for layer in group.quantized())
        square = FLOAT32 * group.in_features**2 if sizes.plan.summed(group) else 0
        sampled = 4 * sizes.sample(group) * (1 + rows // max(group.in_features, 1))
        tile = FLOAT32 * group.in_features * min(rows, _height(sizes.plan, group))
        stored = sum(
            sizes.source.tensors[f"{layer.name}.weight"].num_bytes
            for layer in group.quantized()
            if f"{layer.name}.weight" in sizes.source.tensors
        )
        received = received_bytes(sizes, group)
        candidates.append(
            {
                "block": 2 * stored,
                "solve": received + copies * square + _COPIES_OF_A_TILE * tile + sampled,
                "codes": 2 * rows * group.in_features,
                "shared objects": received + rows * group.in_features,
            }
        )
    return max(candidates, key=_total)


def _height(plan: Plan, group: GroupPlan) -> int:
    """Rows that are solved together: on an accelerator, tiles that meet."""
    height = plan.contract.row_tile
    if plan.contract.kind["device"] == "cpu":
        return height
    return max(height, RUN_WEIGHTS // group.in_features)


def received_bytes(sizes: Sizes, group: GroupPlan) -> int:
    """What comes for one group: all sums as they are, or in bands that are finished already."""
    square = FLOAT32 * group.in_features**2
    if sizes.plan.statistics:
        return square + square // 2  # as stored, and unpacked
    if not sizes.plan.summed(group):
        return 2 * sizes.sample(group)
    return square if band_count(group.in_features, sizes.hands) > 1 else sizes.nodes * square


def _products(sizes: Sizes) -> int:
    """What a forward of one micro-batch holds at most, hooks and masks included."""
    layers = list(sizes.plan.layers())
    inside = [layer for layer in layers if layer is not sizes.plan.head]
    widest = max(max(layer.in_features, layer.out_features) for layer in inside)
    hidden, item = sizes.architecture.hidden_size, sizes.item
    forward = item * (4 * widest + 8 * hidden) + 2 * FLOAT32 * hidden
    hooks = (FLOAT32 + 2 + item + item * sizes.plan.padded) * widest
    calibration = sizes.plan.calibration
    assert calibration is not None
    squares = sizes.plan.contract.micro_batch * calibration.length**2
    masks = squares * (1 + item)
    attention = sizes.architecture.attention
    if attention.capped:
        masks += squares * attention.heads * 2 * FLOAT32
    return sizes.batch_tokens * (forward + hooks) + masks


def _rounding(sizes: Sizes, index: int) -> Parts:
    layers = [layer for g in sizes.plan.blocks[index].groups for layer in g.layers]
    largest = max(layer.out_features * layer.in_features for layer in layers)
    block = 2 * sizes.block_stored(index) + 2 * sizes.block_published(index)
    return {"block": block, "working": 8 * FLOAT32 * largest}


def _fitting(sizes: Sizes) -> Parts:
    """What HQQ has on a device of a linear that no calibration takes there."""
    plan = sizes.plan
    mine = (layer for layer in plan.layers() if layer.scheme and plan.rounding(layer) == "hqq")
    largest = max((layer.out_features * layer.in_features for layer in mine), default=0)
    chunk = min(largest, CHUNK_OF_A_DEVICE)
    return {"solve": FLOAT32 * (5 * largest + _COPIES_OF_A_TILE * chunk)} if largest else {}


def _evaluation(sizes: Sizes, on_device: bool) -> Parts:
    """The largest variant: all linears as rounded, in float32, and the model that computes."""
    weights = sum(weights_of(block) for block in sizes.plan.blocks)
    model = sizes.model + FLOAT32 * weights + _if_cast(sizes, sizes.model_computing, FLOAT32)
    parts = {"libraries": _LIBRARIES_OF_EVALUATION, "model": max(model, 2 * sizes.model_computing)}
    return parts if on_device else parts | {"logits": _logits(sizes)}


def _logits(sizes: Sizes) -> int:
    assert sizes.spec.evaluation is not None
    return 4 * FLOAT32 * sizes.spec.evaluation.length * sizes.architecture.vocabulary


def device_phases(sizes: Sizes, states_on: str) -> Phases:
    """One worker's device memory. A reading host holds what is on its way there."""
    always = {"context": _CONTEXT}
    phases: Phases = {}
    if sizes.plan.calibration is not None:
        coming_and_going = sizes.chunk + (1 + MOST_SENT) * sizes.batch
        states = sizes.share * sizes.chunk if states_on == "device" else coming_and_going
        always["hidden states"] = states
        phases["embed"] = {"embeddings": sizes.outside_computing, "products": 4 * sizes.chunk}
        worst: Phases = {}
        for index in range(len(sizes.plan.blocks)):
            block, found = sizes.block_computing(index), _block_phases(sizes, index)
            held = sizes.block_stored(index)  # once more where the compute dtype is the same
            # results of this block and of the one before it, until that is written: sums, what
            # they were reduced to, codes
            results = (sizes.nodes_held + 1) * sizes.bands(index)
            results += weights_of(sizes.plan.blocks[index])
            kept = 2 * results + SLAB_BYTES
            shapes = {
                "collect": {
                    "block": held + block + sizes.block_published(index),
                    "hessians": found["collect"]["hessians"],
                    "kept": kept,
                    "products": found["collect"]["products"],
                },
                "solve": {
                    "block": held + sizes.block_published(index),
                    "kept": kept,  # with the sums
                    "solve": found["solve"].get("solve", 0),
                    "codes": 2 * weights_of(sizes.plan.blocks[index]),
                },
                "advance": {
                    "block": held + 2 * block + sizes.block_published(index),
                    "products": found["advance"]["products"],
                },
            }
            if "boundary" in found:
                parts = found["boundary"]
                shapes["boundary"] = {
                    "block": parts["block"],
                    "kept": MOST_WAITING * sizes.hands * sizes.chunk + SLAB_BYTES,  # not yet taken
                    "products": parts["products"],
                }
            for phase, parts in shapes.items():
                if _total(parts) > _total(worst.get(phase, {})):
                    worst[phase] = parts
        phases |= worst
    if sizes.spec.evaluation is not None:
        phases["evaluate"] = {"model": sizes.model_computing, "logits": _logits(sizes)}
        always = always if sizes.plan.calibration is None else {"context": _CONTEXT}
    if sizes.plan.calibration is None:
        phases["round"] = _fitting(sizes)
    found = {phase: always | parts for phase, parts in phases.items()}
    return {phase: _with_crumbs(parts) for phase, parts in found.items()}


def whole_model(sizes: Sizes, calls: Iterable[int], cache_tokens: int, copies: int) -> Phases:
    """A model that runs whole in the compute dtype, called with these numbers of tokens.

    Copies of what its calls hold are kept, but no weights beside its own. While it is read all is
    on the host.
    """
    on_device = sizes.plan.contract.kind["device"] != "cpu"
    item, hidden, calls = sizes.item, sizes.architecture.hidden_size, list(calls)
    computing = sizes.model_computing // sizes.evaluation_item * item
    widest = max(layer.in_features + layer.out_features for layer in sizes.plan.layers())
    each_token = item * (4 * widest + 8 * hidden) + 4 * FLOAT32 * widest  # sums of 8-bit products
    cached = cache_tokens * sum(tokens for tokens in calls if is_step(tokens))
    logits = 4 * FLOAT32 * sizes.architecture.vocabulary
    states = max(calls) * each_token + cached * _cached(sizes) + len(calls) * logits
    host = {
        "interpreter": _INTERPRETER + on_device * _DRIVER_LIBRARIES,
        "libraries": _LIBRARIES_OF_EVALUATION,
    }
    running = {"model": computing, "states": copies * states}
    phases = {
        "read": {**host, "model": sizes.model + _if_cast(sizes, computing)},
        "run": {"context": _CONTEXT, **running} if on_device else {**host, **running},
    }
    return {phase: _with_crumbs(parts) for phase, parts in phases.items()}


def _cached(sizes: Sizes) -> int:
    """Keys and values of one token."""
    attention = sizes.architecture.attention
    return 2 * len(sizes.plan.blocks) * attention.kept_heads * attention.width * sizes.item


def _with_crumbs(parts: Parts) -> Parts:
    return parts | {"crumbs": int(_CRUMBS * _total(parts))}


def _if_cast(sizes: Sizes, computing: int, item: int | None = None) -> int:
    """The copy in the compute dtype, where the one that is read has another."""
    read = {info.dtype.itemsize for info in sizes.source.tensors.values()}
    same = item == sizes.item if item is not None else read == {sizes.item}
    return 0 if same else computing


def _total(parts: Mapping[str, int]) -> int:
    return sum(parts.values())
