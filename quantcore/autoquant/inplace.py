"""A model's linears quantized in place, each as is fastest here: recorded, timed, chosen, swapped.

    auto = autoquant(model, ("default", "int4"), budgets=Budgets(error=0.1), held_out=[ids])
    model(ids)                  # recorded; then all the rest, before the call returns
    auto.plan                   # what was chosen: document.written makes it JSON
    model = torch.compile(model)

    auto = autoquant(model, calls=None)
    for ids in many:
        model(ids)
    auto.finalize()

    restore(model, plan)        # the same choices, and nothing timed

Schemes are rounded plainly. Without a budget of error the fastest is taken, whatever it loses; the
class "default" loses little. With held-out inputs errors are in nats a token (divergence.py), and a
plan whose measured divergence exceeds its budget is chosen again, with errors corrected by how far.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from quantcore.autoquant.candidates import DENSE, Candidate, candidate_of, schemes_of
from quantcore.autoquant.choice import Budgets, Choice, Objective, choose
from quantcore.autoquant.costs import Spot, checked, measured, refuse_apart, spots_of
from quantcore.autoquant.divergence import HeldOut, undone
from quantcore.autoquant.document import Check, Plan, refuse_other_hardware
from quantcore.autoquant.front import front
from quantcore.autoquant.hardware import hardware_here
from quantcore.autoquant.measurements import HardwareKind, Measurements, merged
from quantcore.autoquant.options import Layer, Profile
from quantcore.autoquant.program import keeps
from quantcore.autoquant.race import Effort
from quantcore.autoquant.timing import Bench
from quantcore.errors import QuantizationError
from quantcore.inductor import recommended_inductor_settings
from quantcore.joining import TOGETHER, join_linears, joinable
from quantcore.quantize import Filter, linears_of, quantize_
from quantcore.recorder import Recorder
from quantcore.schemes import Scheme

_ROWS_OF_A_CALL, _MOST_ROWS = 128, 512  # tokens that errors are measured on
_MOST_CHOICES = 8


class Autoquant:
    """A model that is recorded until it is finalized."""

    plan: Plan | None = None
    ignored: tuple[str, ...] = ()  # measurements that could not be used, and why

    def __init__(  # noqa: PLR0913 - see autoquant
        self,
        model: nn.Module,
        schemes: Sequence[Scheme],
        linears: Mapping[str, nn.Linear],
        *,
        objective: Objective,
        budgets: Budgets,
        profile: Profile | None,
        held_out: Sequence[Any],
        calls: int | None,
        join: bool,
        measurements: Measurements,
        hardware: HardwareKind,
        bench: Bench,
        effort: Effort,
    ) -> None:
        self._model, self._schemes, self._linears = model, schemes, linears
        self._objective, self._budgets, self._profile = objective, budgets, profile
        self._held_out, self._calls = held_out, calls
        self.measurements, self._hardware = measurements, hardware
        self._bench, self._effort = bench, effort
        self._joined = [
            names
            for names in joinable(model, TOGETHER if join else ())
            if linears.keys() >= {*names}
        ]
        self._recorder = Recorder(
            model,
            lambda name, _: name in linears,
            moments=False,
            sample_rows=_ROWS_OF_A_CALL,
            most_rows=_MOST_ROWS,
            share=join,
        )
        self._recorder.__enter__()
        self._hook: Any = model.register_forward_hook(self._called)

    def _called(self, *_: Any) -> None:
        if self._calls is not None:
            self._calls -= 1
            if self._calls == 0:
                self.finalize()

    def finalize(self) -> Plan:
        """Measure, choose and swap. Where it raises, the model is as it was, and recorded no more.

        What was measured is in `measurements`.
        """
        if self.plan is not None:
            return self.plan
        if self._hook is None:
            raise QuantizationError("autoquant: it has failed already: call it again")
        self._hook.remove()
        self._hook = None
        self._recorder.__exit__(None, None, None)
        self._refuse_uncalled()
        with torch.no_grad():
            self.plan = self._made()
            _swap(self._model, self.plan, self._recorder)
        for names in self._joined:
            _join(self._model, names)
        recommended_inductor_settings()
        return self.plan

    def _refuse_uncalled(self) -> None:
        missing = [name for name in self._linears if name not in self._recorder]
        if missing:
            raise QuantizationError(
                f"autoquant: '{missing[0]}' was not called: call the model first, or leave it out "
                "by filter"
            )
        refuse_apart(self._joined, self._recorder)

    def _made(self) -> Plan:
        recorder, model = self._recorder, self._model
        spots = spots_of(self._linears, self._joined, self._schemes, recorder, self._profile)
        held_out = HeldOut(model, self._held_out) if self._held_out else None
        factors: dict[Scheme, float] = {}
        checks: list[Check] = []
        if held_out is not None:
            factors, checks = checked(model, spots, recorder, held_out)
        known, ignored = self.measurements.of_kind(self._hardware)
        self.ignored = tuple(ignored)
        layers, new = measured(spots, factors, known, self._bench, self._effort)
        self.measurements = merged([self.measurements, Measurements(of={self._hardware: new})])
        plan = Plan(
            hardware=self._hardware,
            profile=spots[0].profile,
            choice=choose(layers, self._objective, self._budgets),
            front=(),
        )
        if held_out is not None:
            plan, check = self._confirmed(plan, layers, spots, held_out)
            checks.append(check)
        correction = plan.choice.correction
        points = front(layers, self._budgets.num_bytes, correction)
        shapes = {
            name: (linear.out_features, linear.in_features)
            for name, linear in self._linears.items()
        }
        ordered = tuple(sorted(layers, key=lambda layer: layer.name))
        return replace(plan, front=points, checks=tuple(checks), measured=ordered, shapes=shapes)

    def _confirmed(
        self, plan: Plan, layers: Sequence[Layer], spots: Sequence[Spot], held_out: HeldOut
    ) -> tuple[Plan, Check]:
        """The plan, or another one, that keeps its budget of error when it is measured."""
        for _ in range(_MOST_CHOICES):
            with undone(self._model, self._linears):
                _swap(self._model, plan, self._recorder)
                divergence = held_out.divergence()
            choice = plan.choice
            check = Check(
                plan="chosen",
                summed=_summed(choice, spots),
                predicted=choice.totals.error,
                measured=divergence,
            )
            limit = self._budgets.error
            if limit is None or keeps(divergence, limit):
                return plan, check
            if choice.totals.error == 0:
                break
            correction = choice.correction * max(1.01, divergence / choice.totals.error)
            again = choose(layers, self._objective, self._budgets, correction)
            plan = replace(plan, choice=again)
        raise QuantizationError(
            f"budget of error: {limit}: the last of {_MOST_CHOICES} plans that should keep it was "
            f"measured to move the model by {divergence:.4g}: write more"
        )


def autoquant(  # noqa: PLR0913 - one call has all there is to say
    model: nn.Module,
    candidates: Iterable[str | Scheme] = ("default",),
    *,
    filter: Filter | None = None,  # noqa: A002 - as quantize_ has it
    objective: Objective = "time",
    budgets: Budgets = Budgets(),  # noqa: B008 - frozen
    profile: Profile | None = None,
    held_out: Sequence[Any] = (),
    calls: int | None = 1,
    join: bool = False,
    measurements: Measurements | None = None,
    hardware: HardwareKind | None = None,
    bench: Bench | None = None,
    effort: Effort = Effort(),  # noqa: B008
) -> Autoquant:
    """Record the model's next calls, then choose for each linear what serves it best, and swap.

    `candidates` are classes of schemes by name (candidates.py), or schemes; the dense weight and
    every layout are among them. `filter` picks linears as for `quantize_`. After so many `calls`
    all is done, or with None when `finalize` is called. Times are of the token counts that were
    recorded, or of a `profile`. `join`: linears of one input, as q, k and v, take one choice and
    become one (joining.py), for serving.

    `measurements` are not timed again; the handle's has the new ones too. Raises SpecError for
    budgets that cannot be kept, with what can, and QuantizationError.
    """
    candidates = list(candidates)
    names = [of for of in candidates if isinstance(of, str)]
    schemes = schemes_of(names) + [of for of in candidates if isinstance(of, Scheme)]
    if not schemes:
        raise QuantizationError("candidates: none: write 'default'")
    if calls is not None and calls < 1:
        raise QuantizationError(f"calls: {calls}: write 1 or more, or None and call finalize()")
    if isinstance(model, torch._dynamo.OptimizedModule):
        raise QuantizationError(
            "model: it is compiled, and calls of it are not seen: hand over the model itself, and "
            "compile it when it is finalized"
        )
    linears = linears_of(model, filter)
    devices = {linear.weight.device.type for linear in linears.values()}
    if len(devices) > 1:
        raise QuantizationError(
            f"model: it lies on {' and '.join(sorted(devices))}: move it to one"
        )
    device = devices.pop()
    return Autoquant(
        model,
        list(dict.fromkeys(schemes)),
        linears,
        objective=objective,
        budgets=budgets,
        profile=profile,
        held_out=held_out,
        calls=calls,
        join=join,
        measurements=measurements or Measurements(of={}),
        hardware=hardware or hardware_here(device),
        bench=bench or Bench(device),
        effort=effort,
    )


def restore(
    model: nn.Module,
    plan: Plan,
    *,
    recorder: Recorder | None = None,
    join: bool = False,
    hardware: HardwareKind | None = None,
    other_hardware: bool = False,
) -> None:
    """Make of a dense model what a plan says, with nothing recorded or timed.

    Raises ResourceError for a plan of another kind of hardware, unless `other_hardware` allows it,
    and QuantizationError where the model is not the plan's; static schemes need a recorder.
    """
    linears = dict(model.named_modules())
    for name in plan.labels():
        if not isinstance(linears.get(name), nn.Linear):
            raise QuantizationError(f"plan: the model has no linear '{name}': plan it anew")
    device = linears[next(iter(plan.labels()))].weight.device.type
    refuse_other_hardware(plan, hardware or hardware_here(device), other_hardware)
    _swap(model, plan, recorder)
    if join:
        for layer in plan.choice.layers:
            if len(layer.linears) > 1:
                _join(model, layer.linears)
    recommended_inductor_settings()


def _swap(model: nn.Module, plan: Plan, recorder: Recorder | None) -> None:
    """All or nothing: a candidate that fails leaves the model dense."""
    taking: dict[Candidate, set[str]] = {}
    for name, label in plan.labels().items():
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


def _join(model: nn.Module, names: Sequence[str]) -> None:
    owner = model.get_submodule(names[0].rpartition(".")[0])
    join_linears(owner, [[name.rpartition(".")[2] for name in names]])


def _summed(choice: Choice, spots: Sequence[Spot]) -> float:
    errors = {spot.name: spot.errors for spot in spots}
    schemes = {layer.layer: layer.option.candidate.scheme for layer in choice.layers}
    return sum(errors[name][scheme] for name, scheme in schemes.items() if scheme is not None)
