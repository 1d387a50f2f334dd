"""A model's linears quantized in place, each as is fastest here: recorded, timed, chosen, swapped.

    auto = autoquant(model, ("default", "int4"), budgets=Budgets(error=0.1), held_out=[ids])
    model(ids)                  # recorded; then all the rest, before the call returns
    auto.plan                   # what was chosen: document.written makes it JSON
    model = torch.compile(model)

    auto = autoquant(model, calls=None)
    for ids in many:
        model(ids)
    auto.finalize()

    restore(model, plan)        # the same choices, and nothing timed (swapping.py)

Schemes are rounded plainly. Without a budget of error the fastest is taken, whatever it loses; the
class "default" loses little. With held-out inputs errors are in nats a token (divergence.py), and a
plan whose measured divergence exceeds its budget is chosen again, with errors corrected by how far.
Told how the model runs, it times a few plans end to end and keeps the fastest (finalists.py).
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import Any, Literal

import torch
from torch import nn

from quantcore.autoquant import finalists
from quantcore.autoquant.candidates import schemes_of
from quantcore.autoquant.choice import Budgets, Choice, Objective
from quantcore.autoquant.choosing import Chooser
from quantcore.autoquant.costs import checked, measured, refuse_apart, spots_of
from quantcore.autoquant.divergence import HeldOut, undone
from quantcore.autoquant.document import CHOSEN, Check, Plan
from quantcore.autoquant.finalists import Prepare, Stage, Timed
from quantcore.autoquant.findings import Findings, Known
from quantcore.autoquant.front import front
from quantcore.autoquant.hardware import hardware_here
from quantcore.autoquant.keys import Keys
from quantcore.autoquant.measurements import HardwareKind, Measurements, merged
from quantcore.autoquant.options import Profile, noise
from quantcore.autoquant.race import Effort
from quantcore.autoquant.spots import Spot, summed
from quantcore.autoquant.swapping import join, swap
from quantcore.autoquant.timing import Bench
from quantcore.errors import QuantizationError
from quantcore.inductor import recommended_inductor_settings
from quantcore.joining import TOGETHER, joinable
from quantcore.quantize import Filter, linears_of
from quantcore.recorder import Recorder
from quantcore.schemes import Scheme
from quantcore.tensors import QuantizedTensor

_ROWS_OF_A_CALL, _MOST_ROWS = 128, 512  # tokens that errors are measured on
RECORDED: Literal["recorded"] = "recorded"


class Autoquant:
    """A model that is recorded until it is finalized."""

    plan: Plan | None = None
    ignored: tuple[str, ...] = ()  # measurements and findings that could not be used, and why
    warnings: tuple[str, ...] = ()  # where noise has decided more than it should
    chosen_s = 0.0  # what measuring and choosing took; the swap comes after

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
        findings: Findings,
        hardware: HardwareKind,
        bench: Bench,
        effort: Effort,
        run: Prepare | Literal["recorded"] | None,
    ) -> None:
        self._model, self._schemes, self._linears = model, schemes, linears
        self._objective, self._budgets, self._profile = objective, budgets, profile
        self._held_out, self._calls = held_out, calls
        self.measurements, self._known = measurements, Known(findings)
        self._hardware, self._bench, self._effort = hardware, bench, effort
        self._run, self._recorded = run, _Recorded()
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
        # a compiled wrapper of the model may call it, too
        called = torch.compiler.disable(self._called)  # type: ignore[no-untyped-call]
        self._hook: Any = model.register_forward_hook(called, with_kwargs=True)

    @property
    def findings(self) -> Findings:
        return self._known.all()

    def _called(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], __: Any) -> None:
        if self._run == RECORDED:
            self._recorded.add(args, kwargs)
        if self._calls is not None:
            self._calls -= 1
            if self._calls == 0:
                self.finalize()

    def finalize(self) -> Plan:
        """Measure, choose and swap. Where it raises, the model is as it was, and recorded no more.

        What was measured is in `measurements` and `findings`.
        """
        if self.plan is not None:
            return self.plan
        if self._hook is None:
            raise QuantizationError("autoquant: it has failed already: call it again")
        self._hook.remove()
        self._hook = None
        self._recorder.__exit__(None, None, None)
        self._refuse_uncalled()
        self._refuse_changed()
        # what is made here outlives a call in inference mode, whose tensors would not
        with torch.inference_mode(False), torch.no_grad():
            begun_s = time.perf_counter()
            self.plan = self._made()
            self.chosen_s = time.perf_counter() - begun_s
            swap(self._model, self.plan.labels(), self._recorder)
            for names in self._joined:
                join(self._model, names)
        recommended_inductor_settings()
        return self.plan

    def _refuse_uncalled(self) -> None:
        recorder = self._recorder
        missing = [n for n in self._linears if n not in recorder or not recorder[n].calls]
        if missing:
            raise QuantizationError(
                f"autoquant: '{missing[0]}' was not called: call the model first, or leave it out "
                "by filter"
            )
        refuse_apart(self._joined, recorder)

    def _refuse_changed(self) -> None:
        modules = dict(self._model.named_modules())
        for name, linear in self._linears.items():
            if modules.get(name) is not linear or isinstance(linear.weight, QuantizedTensor):
                raise QuantizationError(
                    f"autoquant: '{name}' is another than was recorded, or was quantized since: "
                    "call it again"
                )

    def _made(self) -> Plan:
        recorder, model, known = self._recorder, self._model, self._known
        keys = Keys(model, self._linears, recorder, self._held_out)
        spots = spots_of(
            self._linears, self._joined, self._schemes, recorder, self._profile, known, keys
        )
        held_out = cache(lambda: HeldOut(model, self._held_out))  # while the model is dense
        factors: dict[Scheme, float] = {}
        checks: list[Check] = []
        if self._held_out:
            factors, checks = checked(model, spots, recorder, held_out, known, keys)
        timings, ignored = self.measurements.of_kind(self._hardware)
        self.ignored = (*ignored, *self.findings.ignored)
        layers, new = measured(spots, factors, timings, self._bench, self._effort)
        self.measurements = merged([self.measurements, Measurements(of={self._hardware: new})])

        def confirm(choice: Choice) -> Check:
            return self._check(choice, spots, held_out, known, keys)

        outcome = Chooser(
            objective=self._objective,
            budgets=self._budgets,
            confirm=confirm if self._held_out else None,
            timed=self._timed(spots),
        ).chosen(layers)
        self.warnings = tuple(filter(None, [noise(layers), finalists.noise(outcome.ends)]))
        ordered = tuple(sorted(outcome.layers, key=lambda layer: layer.name))
        return Plan(
            hardware=self._hardware,
            profile=spots[0].profile,
            choice=outcome.choice,
            front=front(ordered, self._budgets.num_bytes, outcome.choice.correction),
            checks=(*checks, *([outcome.check] if outcome.check else [])),
            ends=outcome.ends,
            factors=outcome.factors,
            measured=ordered,
            shapes={
                name: (linear.out_features, linear.in_features)
                for name, linear in self._linears.items()
            },
        )

    def _timed(self, spots: Sequence[Spot]) -> Timed | None:
        run = self._recorded.again if self._run == RECORDED else self._run
        if run is None:
            return None
        return Stage(
            model=self._model,
            layers={spot.name: spot.linears for spot in spots},
            joined=self._joined,
            recorder=self._recorder,
            prepare=lambda model: {1: run(model)},
            calls={1: 1.0},  # all of the profile's, at once
        ).timed

    def _check(
        self,
        choice: Choice,
        spots: Sequence[Spot],
        held_out: Callable[[], HeldOut],
        known: Known,
        keys: Keys,
    ) -> Check:
        labels = {name: layer.option.label for layer in choice.layers for name in layer.linears}
        finding = keys.of_plan(labels)
        if finding not in known:
            compared = held_out()
            with undone(self._model, self._linears):
                swap(self._model, labels, self._recorder)
                known.add({finding: compared.divergence()})
        return Check(
            plan=CHOSEN,
            summed=summed(choice, spots),
            predicted=choice.totals.error,
            measured=known[finding],
        )


def autoquant(  # noqa: PLR0913 - one call has all there is to say
    model: nn.Module,
    candidates: str | Scheme | Iterable[str | Scheme] = ("default",),
    *,
    filter: Filter | None = None,  # noqa: A002 - as quantize_ has it
    objective: Objective = "time",
    budgets: Budgets = Budgets(),  # noqa: B008 - frozen
    profile: Profile | None = None,
    held_out: Sequence[Any] = (),
    calls: int | None = 1,
    join: bool = False,
    run: Prepare | Literal["recorded"] | None = None,
    measurements: Measurements | None = None,
    findings: Findings | None = None,
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

    `run` is handed the model as each of a few plans leaves it, and gives what then is timed end to
    end, once for all calls of the profile: a step from a static cache, a CUDA graph's replay. With
    "recorded" it is the recorded calls again. The fastest is kept.

    What `measurements` and `findings` have is not measured again; the handle's have the new ones
    too. Raises SpecError for budgets that cannot be kept, with what can, and QuantizationError.
    """
    candidates = [candidates] if isinstance(candidates, str | Scheme) else list(candidates)
    if odd := [of for of in candidates if not isinstance(of, str | Scheme)]:
        raise QuantizationError(
            f"candidates: {odd[0]!r} is neither a class nor a scheme: write 'default', or a Scheme"
        )
    names = [of for of in candidates if isinstance(of, str)]
    schemes = schemes_of(names) + [of for of in candidates if isinstance(of, Scheme)]
    if not schemes:
        raise QuantizationError("candidates: none: write 'default'")
    if run is not None and objective != "time":
        raise QuantizationError("run: plans are told apart by time: write objective='time'")
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
        findings=findings or Findings(),
        hardware=hardware or hardware_here(device),
        bench=bench or Bench(device),
        effort=effort,
        run=run,
    )


class _Recorded:
    """Calls that were recorded, and may be made again."""

    def __init__(self) -> None:
        self._calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def add(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._calls.append((args, kwargs))

    def again(self, model: nn.Module) -> Callable[[], object]:
        if any(kwargs.get("past_key_values") is not None for _, kwargs in self._calls):
            raise QuantizationError(
                "run: a call was recorded that had a cache, which grows when it is made again: "
                "write a function of the model that gives what to time"
            )
        return lambda: [model(*args, **kwargs) for args, kwargs in self._calls]
