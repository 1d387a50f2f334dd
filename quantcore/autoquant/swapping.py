"""Weights of a model put in place as a plan says, and taken back; a plan restored as a whole.

restore(model, plan)     # of a dense model: rounded plainly, the plan's choices
relay(model, plan)       # of a loaded artifact: its own codes, laid as the plan has them
"""

from collections.abc import Mapping, Sequence

from torch import nn

from quantcore.autoquant.candidates import DENSE, Candidate, candidate_of
from quantcore.autoquant.document import Plan, refuse_other_hardware
from quantcore.autoquant.hardware import hardware_here
from quantcore.autoquant.measurements import HardwareKind
from quantcore.errors import QuantizationError
from quantcore.inductor import recommended_inductor_settings
from quantcore.joining import join_linears
from quantcore.quantize import quantize_
from quantcore.recorder import InputStatistics
from quantcore.tensors import QuantizedTensor, relayout


def restore(
    model: nn.Module,
    plan: Plan,
    *,
    recorder: Mapping[str, InputStatistics] | None = None,
    join: bool = False,
    hardware: HardwareKind | None = None,
    other_hardware: bool = False,
) -> None:
    """Make of a dense model what a plan says, with nothing recorded or timed.

    Raises ResourceError for a plan of another kind of hardware, unless `other_hardware` allows it,
    and QuantizationError where the model is not the plan's; static schemes need a recorder.
    """
    _refuse_other(model, plan, hardware, other_hardware)
    swap(model, plan.labels(), recorder)
    _finish(model, plan, join)


def relay(
    model: nn.Module,
    plan: Plan,
    *,
    join: bool = False,
    hardware: HardwareKind | None = None,
    other_hardware: bool = False,
) -> None:
    """Lay the weights of a loaded artifact, which a job made by this plan, as the plan has them.

    No code changes. Raises QuantizationError where a linear has another scheme than the plan's (an
    override's, say), and as `restore` does.
    """
    linears = _refuse_other(model, plan, hardware, other_hardware)
    laid: dict[str, QuantizedTensor] = {}
    for name, label in plan.labels().items():
        candidate, weight = candidate_of(label), linears[name].weight
        scheme = weight.scheme if isinstance(weight, QuantizedTensor) else None
        if scheme != candidate.scheme:
            found = "dense" if scheme is None else scheme.label()
            raise QuantizationError(
                f"plan: '{name}' is {found}, and {label} in the plan: name the plan that the "
                "artifact was made by"
            )
        if isinstance(weight, QuantizedTensor):
            try:
                laid[name] = relayout(weight, candidate.layout)
            except QuantizationError as error:
                raise QuantizationError(f"'{name}': {error}") from None
    for name, weight in laid.items():
        linears[name].weight = nn.Parameter(weight, requires_grad=False)
    _finish(model, plan, join)


def swap(
    model: nn.Module, labels: Mapping[str, str], recorder: Mapping[str, InputStatistics] | None
) -> None:
    """By linear, what it becomes. All or nothing: a candidate that fails leaves the model dense."""
    taking: dict[Candidate, set[str]] = {}
    for name, label in labels.items():
        taking.setdefault(candidate_of(label), set()).add(name)
    taking.pop(DENSE, None)
    linears = {name: model.get_submodule(name) for names in taking.values() for name in names}
    before = {name: linear.weight for name, linear in linears.items()}
    try:
        for candidate, names in taking.items():
            assert candidate.scheme is not None
            quantize_(
                model,
                candidate.scheme,
                lambda name, _, names=names: name in names,  # type: ignore[misc]
                layout=candidate.layout,
                recorder=recorder if candidate.scheme.static else None,
                inductor_settings=False,
            )
    except BaseException:
        for name, weight in before.items():
            linears[name].weight = weight
        raise


def join(model: nn.Module, names: Sequence[str]) -> None:
    owner = model.get_submodule(names[0].rpartition(".")[0])
    join_linears(owner, [[name.rpartition(".")[2] for name in names]])


def _refuse_other(
    model: nn.Module, plan: Plan, hardware: HardwareKind | None, other_hardware: bool
) -> dict[str, nn.Linear]:
    modules = dict(model.named_modules())
    linears: dict[str, nn.Linear] = {}
    for name in plan.labels():
        linear = modules.get(name)
        if not isinstance(linear, nn.Linear):
            raise QuantizationError(f"plan: the model has no linear '{name}': plan it anew")
        here = (linear.out_features, linear.in_features)
        if (said := plan.shapes.get(name, here)) != here:
            raise QuantizationError(
                f"plan: '{name}' has {said[0]} outputs and {said[1]} inputs in the plan, and "
                f"{here[0]} and {here[1]} in the model: plan it anew"
            )
        linears[name] = linear
    device = next(iter(linears.values())).weight.device.type
    refuse_other_hardware(plan, hardware or hardware_here(device), other_hardware)
    return linears


def _finish(model: nn.Module, plan: Plan, joined: bool) -> None:
    if joined:
        for layer in plan.choice.layers:
            if len(layer.linears) > 1:
                join(model, layer.linears)
    recommended_inductor_settings()
