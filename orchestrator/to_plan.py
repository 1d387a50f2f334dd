"""A job with `method: plan` as something to be measured: linears, candidates, and what they are of.

Workers are started for a job over the same linears that rounds them all: its checks and what it is
predicted to need are this one's too. Linears that an override skips, or gives a scheme, take no
part. A scheme does if the job's format holds it, beside those named before it, and the job's
rounding knows it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from jobs.load import Document
from jobs.spec import EvaluationSpec, JobSpec
from orchestrator.checks import Look, Prepared, look_here, prepare, read_job
from orchestrator.identity import stored_job
from orchestrator.machines import choose_fleet
from orchestrator.plan_keys import errors_key, model_key
from orchestrator.plan_room import Stand, stand_of
from orchestrator.planned import artifact_name
from orchestrator.team import Team
from quantcore.autoquant.candidates import Candidate, schemes_of
from quantcore.autoquant.choice import Budgets
from quantcore.autoquant.document import file_name
from quantcore.autoquant.measurements import HardwareKind
from quantcore.autoquant.options import PROFILES, Profile
from quantcore.autoquant.shapes import bytes_of
from quantcore.autoquant.spots import Features, legal
from quantcore.errors import Fault, ResourceError, SourceError, SpecError
from quantcore.formats import FORMATS
from quantcore.joining import TOGETHER
from quantcore.schemes import Scheme
from workers.calibration import encode
from workers.machine import Machine
from workers.plan import GroupPlan, LayerPlan, Plan
from workers.store import open_store

_HELD_OUT_WINDOWS, _HELD_OUT_TOKENS, _HELD_OUT_CHARACTERS = 4, 512, 200_000


@dataclass(frozen=True, slots=True)
class Family:
    """Linears that take one choice, because the runtime multiplies by them as by one."""

    linears: dict[str, Features]
    schemes: tuple[Scheme, ...]  # that the job's format holds in their shapes


@dataclass(frozen=True, slots=True, eq=False)
class Kind:
    """One kind of hardware of the fleet, with what a worker of it is started by."""

    hardware: HardwareKind
    device: str
    prepared: Prepared
    offered: tuple[tuple[Candidate, ...], ...]  # by family
    stand: Stand | str  # how whole models run on it, or why none does


@dataclass(frozen=True, slots=True)
class ToPlan:
    spec: JobSpec  # as it is written
    families: tuple[Family, ...]  # in the model's order
    kinds: tuple[Kind, ...]  # the fastest first
    profile: Profile
    budgets: Budgets
    dtype: str
    key: str  # of all that errors are measured on
    model_key: str  # of what whole models are run of
    blocks: dict[str, int]  # by linear
    held_out: tuple[tuple[int, ...], ...]  # token ids; none: no whole model is checked
    notes: tuple[str, ...]

    @property
    def folder(self) -> str:
        """Of the job, in its store."""
        return f"{self.spec.output.store.rstrip('/')}/{self.spec.name}"


def check_to_plan(path: Path, *, look_at: Look = look_here) -> ToPlan:
    """Raises JobFaults with every fault found, SpecError for a job that is not to be planned."""
    spec, document, faults = read_job(path)
    if spec.quantization.method != "plan":
        raise SpecError(f"{path}: quantization.method: {spec.quantization.method} needs no plan")
    _refuse_begun(spec)
    schemes, notes = _schemes(spec)
    faults += _unfit(spec, schemes, document)
    machines: list[Machine] = []

    def seen(paths: Sequence[str]) -> Sequence[Machine]:
        machines[:] = look_at(paths)
        return machines

    prepared = prepare(_rounded(spec), document, faults, look_at=seen)
    held_out = _held_out(spec, prepared)
    families = _families(prepared.plan, spec, schemes)
    dtype = prepared.plan.contract.compute_dtype
    profile = _profile(spec, prepared.plan)
    kinds = _kinds(spec, prepared, families, dtype, profile)
    _refuse_namesakes(kinds)
    _refuse_followed(spec, kinds)
    _refuse_too_few_bytes(spec, families, kinds, dtype)
    budgets = spec.quantization.planning.budgets
    return ToPlan(
        spec=spec,
        families=families,
        kinds=kinds,
        profile=profile,
        budgets=Budgets(
            num_bytes=budgets.num_bytes(), error=budgets.error, time_us=budgets.time_us
        ),
        dtype=dtype,
        key=errors_key(prepared),
        model_key=model_key(prepared),
        blocks={
            layer.name: number
            for number, block in enumerate(prepared.plan.blocks)
            for layer in block.quantized()
        },
        held_out=held_out,
        notes=(
            *notes,
            *prepared.admitted.notes,
            *prepared.tokenizer.memory.warnings,
            *_passed_over(spec, kinds, machines),
            *dict.fromkeys(k.stand for k in kinds if isinstance(k.stand, str) and k.stand),
        ),
    )


def _refuse_begun(spec: JobSpec) -> None:
    store = open_store(f"{spec.output.store.rstrip('/')}/{spec.name}")
    if stored_job(store) is not None:
        raise SpecError(
            f"{store.url}: the job was begun, and follows the plan that is there: write another "
            "name for another plan"
        )


def _refuse_followed(spec: JobSpec, kinds: Sequence[Kind]) -> None:
    """With each_kind: a kind whose artifact was begun; others may still be planned, and added."""
    for kind in kinds:
        name = artifact_name(spec.name, kind.hardware)
        store = open_store(f"{spec.output.store.rstrip('/')}/{name}")
        if stored_job(store) is not None:
            raise SpecError(
                f"{store.url}: the job was begun, and follows the plan that is there: write "
                "another name for another plan"
            )


def _rounded(spec: JobSpec) -> JobSpec:
    """The job that rounds each linear which is to be planned, and leaves the others.

    Kinds of a mixed fleet have their workers in turn: the job's count is of each (`_kind`).
    """
    quantization = spec.quantization
    overrides = tuple(
        override.model_copy(
            update={
                "skip": override.skip or override.scheme is not None,
                "method": "rtn" if override.scheme is None and not override.skip else None,
                **dict.fromkeys(("scheme", "group_size", "symmetric", "zero_point")),
            }
        )
        for override in quantization.overrides
    )
    changes = {"method": "rtn", "scheme": "int8", "plan": None, "overrides": overrides}
    quantization = quantization.model_copy(update=changes)
    held_out = spec.quantization.planning.held_out
    evaluation = spec.evaluation
    if held_out is not None and held_out.is_file():  # it takes a whole model, as evaluating does
        evaluation = evaluation or EvaluationSpec(text=held_out, length=_HELD_OUT_TOKENS)
    workers = spec.workers
    if workers.kind == "mixed":
        workers = workers.model_copy(update={"count": None})
    changed = {"quantization": quantization, "evaluation": evaluation, "workers": workers}
    return spec.model_copy(update=changed)


def _schemes(spec: JobSpec) -> tuple[list[Scheme], list[str]]:
    """Those of the job's candidates that it can end in, and a note of the others."""
    form, planning = FORMATS[spec.output.format], spec.quantization.planning
    kept: list[Scheme] = []
    left: dict[str, list[str]] = {}  # by why
    for scheme in schemes_of(planning.candidates):
        why = form.refusal("Linear", scheme) or form.refusal_together(frozenset((*kept, scheme)))
        if why is None:
            try:
                spec.quantization.refuse_method(scheme, planning.rounding)
            except ValueError as error:
                why = str(error)
        if why is None:
            kept.append(scheme)
        else:
            left.setdefault(why, []).append(scheme.label())
    return kept, [f"left out: {', '.join(labels)}: {why}" for why, labels in left.items()]


def _unfit(spec: JobSpec, schemes: Sequence[Scheme], document: Document) -> list[Fault]:
    faults = []
    if not schemes:
        message = f"{spec.output.format} and the plan's rounding take none of them: name others"
        faults.append(document.fault(("quantization", "plan", "candidates"), message))
    if spec.calibration is None:
        message = "a plan's errors are measured on texts: add a calibration section"
        faults.append(document.fault(("calibration",), message))
    elif spec.calibration.statistics and spec.quantization.planning.profile == "recorded":
        message = "kept statistics do not tell how linears were called: write a named profile"
        faults.append(document.fault(("quantization", "plan", "profile"), message))
    held_out = spec.quantization.planning.held_out
    if held_out is not None and not held_out.is_file():
        message = f"there is no file {held_out}"
        where = ("quantization", "plan", "held_out")
        faults.append(document.fault(where, message, kind=SourceError))
    return faults


def _held_out(spec: JobSpec, prepared: Prepared) -> tuple[tuple[int, ...], ...]:
    """Windows of the held-out text, spread over its beginning."""
    path = spec.quantization.planning.held_out
    if path is None:
        return ()
    try:
        text = path.read_text(encoding="utf-8")[:_HELD_OUT_CHARACTERS]
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"quantization.plan.held_out: cannot read {path}: {error}") from None
    ids = encode(prepared.tokenizer, text)
    length = min(_HELD_OUT_TOKENS, prepared.architecture.max_length or _HELD_OUT_TOKENS)
    count = min(_HELD_OUT_WINDOWS, len(ids) // length)
    if count == 0:
        raise SpecError(
            f"quantization.plan.held_out: {path} has {len(ids)} tokens: give {length} or more"
        )
    starts = (number * (len(ids) // count) for number in range(count))
    return tuple(tuple(ids[start : start + length]) for start in starts)


def _families(plan: Plan, spec: JobSpec, schemes: Sequence[Scheme]) -> tuple[Family, ...]:
    return tuple(
        _family(members, spec, schemes)
        for block in plan.blocks
        for group in block.groups
        for members in _joined(group)
    )


def _joined(group: GroupPlan) -> list[list[LayerPlan]]:
    """A group's linears; those that runtimes join (quantcore/joining.py) together."""
    left = {layer.name: layer for layer in group.quantized()}
    families = []
    while left:
        owner, _, leaf = next(iter(left)).rpartition(".")
        for leaves in TOGETHER:
            names = [f"{owner}.{other}" for other in leaves]
            if leaf in leaves and all(name in left for name in names):
                break
        else:
            names = [next(iter(left))]
        families.append([left.pop(name) for name in names])
    return families


def _family(members: list[LayerPlan], spec: JobSpec, schemes: Sequence[Scheme]) -> Family:
    refusal = FORMATS[spec.output.format].shape_refusal
    held = [
        scheme
        for scheme in schemes
        if not any(refusal(scheme, of.out_features, of.in_features) for of in members)
    ]
    return Family({of.name: (of.out_features, of.in_features) for of in members}, tuple(held))


def _kinds(
    spec: JobSpec, prepared: Prepared, families: Sequence[Family], dtype: str, profile: Profile
) -> tuple[Kind, ...]:
    """Those that times know apart: workers may differ in more, which decides bits alone."""
    found: dict[HardwareKind, Kind] = {}
    for number in range(len(prepared.team.parts)):
        kind = _kind(spec, prepared, families, dtype, profile, number)
        found.setdefault(kind.hardware, kind)
    return tuple(found.values())


def _kind(
    spec: JobSpec,
    prepared: Prepared,
    families: Sequence[Family],
    dtype: str,
    profile: Profile,
    number: int,
) -> Kind:
    chosen, admitted = prepared.team.parts[number]
    workers = min(admitted.prediction.workers, spec.workers.count or admitted.prediction.workers)
    admitted = replace(admitted, prediction=replace(admitted.prediction, workers=workers))
    threads = spec.quantization.planning.threads or spec.workers.threads
    contract = replace(prepared.plan.contract, kind=chosen.kind)
    alone = replace(
        prepared,
        team=Team(((chosen, admitted),)),
        plan=replace(prepared.plan, contract=contract),
    )
    found: dict[Any, tuple[Candidate, ...]] = {}  # blocks are alike: each shape is looked at once
    offered = []
    for family in families:
        shapes = tuple(family.linears.values())
        if (shapes, family.schemes) not in found:
            of = legal(shapes, family.schemes, dtype, chosen.device)
            found[shapes, family.schemes] = of
        offered.append(found[shapes, family.schemes])
    hardware = HardwareKind.of(chosen.kind, threads=threads if chosen.device == "cpu" else 0)
    stand = stand_of(spec, alone, chosen, admitted, profile)
    return Kind(hardware, chosen.device, alone, tuple(offered), stand)


def _refuse_namesakes(kinds: Sequence[Kind]) -> None:
    names = [file_name(kind.hardware) for kind in kinds]
    for at, name in enumerate(names):
        if name in names[:at]:
            one, other = kinds[names.index(name)], kinds[at]
            raise ResourceError(
                f"two kinds of one name would share {name}: {one.hardware.label()}, and "
                f"{other.hardware.label()}: plan on the nodes of one"
            )


def _refuse_too_few_bytes(
    spec: JobSpec, families: Sequence[Family], kinds: Sequence[Kind], dtype: str
) -> None:
    """Bytes are known before anything is measured."""
    limit = spec.quantization.planning.budgets.num_bytes()

    @cache
    def size(candidate: Candidate, rows: int, columns: int) -> int:
        return bytes_of(candidate, rows, columns, dtype)

    for kind in kinds if limit is not None else ():
        least = 0
        for family, offered in zip(families, kind.offered, strict=True):
            shapes = list(family.linears.values())
            rows = sum(rows for rows, _ in shapes)
            least += min(size(candidate, rows, shapes[0][1]) for candidate in offered)
        if limit is not None and least > limit:
            raise SpecError(
                f"quantization.plan.budgets.bytes: no plan for {kind.hardware.full_name()} has "
                f"{limit:.0f} or less: write {least} or more, the least that can be had"
            )


def _passed_over(
    spec: JobSpec, kinds: Sequence[Kind], machines: Sequence[Machine]
) -> tuple[str, ...]:
    """A note of what else the cluster has, and is not asked."""
    planned = {kind.hardware.full_name() for kind in kinds}
    others = (
        HardwareKind.of(of.kind).full_name()
        for of in choose_fleet(machines, "mixed")
        if spec.workers.kind in {"auto", of.device}
    )
    names = [name for name in dict.fromkeys(others) if name not in planned]
    if not names:
        return ()
    return (f"not planned for: {', '.join(names)}: workers.kind: mixed plans for every kind",)


def _profile(spec: JobSpec, plan: Plan) -> Profile:
    planning = spec.quantization.planning
    if planning.calls:
        return Profile(name="stated", calls={one.tokens: one.times for one in planning.calls})
    if planning.profile != "recorded":
        return PROFILES[planning.profile]
    assert plan.calibration is not None
    size, length = plan.contract.micro_batch, plan.calibration.length
    whole, rest = divmod(plan.calibration.sequences, size)
    calls: dict[int, float] = {size * length: whole} if whole else {}
    return Profile(name="recorded", calls=calls | ({rest * length: 1} if rest else {}))
