"""Plans over linears by name, as tests need them: what they choose is given, not found."""

from collections.abc import Mapping, Sequence

from quantcore.autoquant.candidates import DENSE_LABEL, candidate_of
from quantcore.autoquant.choice import Budgets, Objective, choose
from quantcore.autoquant.document import Plan
from quantcore.autoquant.front import front
from quantcore.autoquant.measurements import HardwareKind
from quantcore.autoquant.options import PROFILES, Layer, Option, Time
from workers.kind import hardware_kind

H200 = HardwareKind(
    device="cuda", name="NVIDIA H200", driver="570.1", torch="2.11.0", triton="3.6.0", kernels="a:1"
)

INT4 = "int4 sym g32 plain"
INT8 = "int8 sym channel plain"
FLOAT8 = "float8 channel plain"
LABELS = (
    "dense",
    FLOAT8,
    "int4 sym g128 plain",
    "int4 sym g64 plain",
    INT8,
)


def here(threads: int = 2) -> HardwareKind:
    return HardwareKind.of(hardware_kind("cpu"), kernels="w8a8:1 weight_only:2", threads=threads)


def option(label: str, time_us: float, num_bytes: int, error: float, noise: float = 0.0) -> Option:
    time = Time(time_us=time_us, low_us=max(0.0, time_us - noise), high_us=time_us + noise)
    return Option(candidate=candidate_of(label), time=time, num_bytes=num_bytes, error=error)


def layer(name: str, *options: Option) -> Layer:
    return Layer(name=name, linears=(name,), options=options)


# q, k and v take one choice
LAYERS = [
    Layer(
        name="block.qkv",
        linears=("block.q", "block.k", "block.v"),
        options=(
            option("dense", 24, 48, 0),
            option(INT8, 12, 24, 0.75, noise=1.5),
            option("int4 sym g64 plain", 6, 15, 9),
        ),
    ),
    layer(
        "block.o",
        option("dense", 7, 16, 0),
        option(FLOAT8, 4.25, 8, 0.5, noise=0.5),
        option(INT8, 4, 8, 1, noise=0.5),
    ),
]


def plan_of(
    labels: Mapping[str, str],
    hardware: HardwareKind | None = None,
    shapes: Mapping[str, tuple[int, int]] | None = None,
    error: float = 0,
) -> Plan:
    """Each linear a layer of its own, with nothing to choose from."""
    layers = [
        Layer(name=name, linears=(name,), options=(option(label, 1, 1, error),))
        for name, label in labels.items()
    ]
    return chosen_from(layers, "time", Budgets(), hardware or here(), shapes)


def chosen_from(
    layers: Sequence[Layer],
    objective: Objective,
    budgets: Budgets,
    hardware: HardwareKind = H200,
    shapes: Mapping[str, tuple[int, int]] | None = None,
) -> Plan:
    return Plan(
        hardware=hardware,
        profile=PROFILES["decode_1"],
        choice=choose(layers, objective, budgets),
        front=front(layers, budgets.num_bytes),
        measured=tuple(sorted(layers, key=lambda layer: layer.name)),
        shapes=shapes or {},
    )


def labels_of(
    blocks: int, attention: str = INT4, mlp: str = INT8, down: str = DENSE_LABEL
) -> dict[str, str]:
    """Of a llama's linears."""
    labels: dict[str, str] = {}
    for block in range(blocks):
        prefix = f"model.layers.{block}"
        labels |= {f"{prefix}.self_attn.{leaf}_proj": attention for leaf in "qkvo"}
        labels |= {f"{prefix}.mlp.{leaf}_proj": mlp for leaf in ("gate", "up")}
        labels[f"{prefix}.mlp.down_proj"] = down
    return labels
