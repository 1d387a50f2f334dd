"""From a checked job and a model's architecture to the plan."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from quantkernels.bits import CONFIGURATION
from torch import Tensor

from jobs.match import matches
from jobs.spec import UNCALIBRATED, JobSpec, Override, SmoothquantSpec
from quantcore.errors import Fault
from quantcore.formats import FORMATS
from quantcore.gptq import GptqConfig
from quantcore.hqq import HqqConfig
from quantcore.schemes import Scheme, dividing_group_sizes
from workers.architecture import Architecture, LinearInfo
from workers.attention import attention_of
from workers.plan import (
    BlockPlan,
    Contract,
    GroupPlan,
    LayerPlan,
    Norm,
    Plan,
    SmoothquantConfig,
)

# Not what the memory has room for: bits hang on it. What does not fit are hidden states, which wait
# elsewhere; where one micro-batch does not either, the job is refused with a length that does.
MICRO_BATCH_TOKENS = {"cpu": 4096, "cuda": 16384, "xpu": 16384, "mixed": 4096}
CHUNKS = 16  # at most this many workers share one calibration
ROW_TILE = 1024
PLAN = "quantization.plan.path"

Schemes = Mapping[str, Scheme | None]  # by linear, as a plan document says; None: left dense


@dataclass(frozen=True, slots=True)
class _Choice:
    """What the job says of one linear, and where it says so."""

    layer: LayerPlan
    info: LinearInfo
    override: int | None  # number of the override that decided
    planned: bool  # whether its scheme is the plan's

    def place(self, key: str) -> str:
        if self.planned:
            return PLAN
        if self.override is None:
            return f"quantization.{key}"
        return f"quantization.overrides.{self.override}"


def plan_layers(
    spec: JobSpec, architecture: Architecture, schemes: Schemes | None = None
) -> tuple[tuple[BlockPlan, ...], LayerPlan | None, list[Fault]]:
    """What becomes of every linear, and what of it cannot be done.

    `schemes` are those of `method: plan`, held against the model already.
    """
    schemes = schemes or {}
    choices = {
        info.name: _choose(spec, info, schemes, last_match(spec, info.name))
        for block in architecture.blocks
        for info in block.linears()
    }
    head, faults = _head(spec, architecture, schemes)
    faults += _unmatched(spec, architecture)
    faults += _refused(spec, list(choices.values()))
    faults += _indivisible(choices.values())
    faults += _unsuited(spec, choices.values())
    faults += _split_fusions(spec, choices)
    layers = [choice.layer for choice in choices.values()] + ([head] if head else [])
    faults += _not_together(spec, layers, planned=bool(schemes))
    if not any(choice.layer.scheme for choice in choices.values()):
        if schemes:
            message = "the plan leaves every linear dense: there is nothing to do"
            faults.append(Fault(field=PLAN, message=message))
        else:
            message = "every layer is skipped: nothing to do"
            faults.append(Fault(field="quantization.overrides", message=message))
    blocks = tuple(
        BlockPlan(
            tuple(
                _group(spec, [choices[info.name].layer for info in group], norm)
                for group, norm in zip(block.groups, block.norms, strict=True)
            )
        )
        for block in architecture.blocks
    )
    faults += _unsmoothed(spec, blocks)
    return blocks, head, faults


def make_plan(
    spec: JobSpec,
    blocks: tuple[BlockPlan, ...],
    head: LayerPlan | None,
    kind: dict[str, str],
    tokens: Tensor | None = None,
    statistics: tuple[dict[str, Any], ...] = (),
) -> Plan:
    """Fix everything that bits depend on. Nothing here may depend on the number of workers."""
    micro_batch, chunks = 1, 1
    if spec.calibration is not None:
        sequences, length = spec.calibration.sequences, spec.calibration.length
        fits = MICRO_BATCH_TOKENS[kind["device"]] // length
        micro_batch = max(1, min(fits, sequences // CHUNKS))
        chunks = min(CHUNKS, math.ceil(sequences / micro_batch))
    gptq = spec.quantization.gptq
    return Plan(
        job=spec.name,
        store=f"{spec.output.store.rstrip('/')}/{spec.name}",
        model_path=spec.model.path,
        gguf_dtype=spec.model.dtype,
        format=spec.output.format,
        blocks=blocks,
        head=head,
        gptq=GptqConfig(
            damping=gptq.damping, act_order=gptq.act_order, block_columns=gptq.block_columns
        ),
        hqq=HqqConfig(**spec.quantization.hqq.model_dump()),
        smoothquant=_smoothquant(spec.quantization.smoothquant),
        search_range=spec.quantization.range == "search",
        calibration=spec.calibration,
        shards=spec.calibration.shards if spec.calibration else 1,
        tokens=None if tokens is None else tokens.to(torch.int32).numpy(),
        statistics=statistics,
        conditional_writes=spec.output.conditional_writes,
        contract=Contract(
            kind=kind,
            threads=spec.workers.threads,
            compute_dtype=spec.compute_dtype,
            micro_batch=micro_batch,
            chunks=chunks,
            row_tile=ROW_TILE,
            attention=attention_of(kind["device"]),
            kernels={} if kind["device"] == "cpu" else dict(CONFIGURATION),
        ),
    )


def _smoothquant(spec: SmoothquantSpec) -> SmoothquantConfig:
    if spec.alpha == "search":
        return SmoothquantConfig(rounding=spec.rounding)
    return SmoothquantConfig(alphas=(spec.alpha,), rounding=spec.rounding)


def _group(spec: JobSpec, layers: list[LayerPlan], norm: Norm | None) -> GroupPlan:
    """SmoothQuant changes what all readers of the norm are handed: it takes all of them, or none.

    A group that has no such norm keeps the factor on its inputs where the job says so; else it is
    rounded as it is, and the report says so.
    """
    if not all(layer.method == "smoothquant" for layer in layers):
        return GroupPlan(tuple(layers))
    at_input = norm is None and spec.quantization.smoothquant.without_norm == "input_factor"
    return GroupPlan(tuple(layers), norm, at_input)


def _unsmoothed(spec: JobSpec, blocks: tuple[BlockPlan, ...]) -> Iterator[Fault]:
    asked = any(layer.method == "smoothquant" for block in blocks for layer in block.quantized())
    groups = [group for block in blocks for group in block.groups]
    if spec.quantization.smoothquant.without_norm == "input_factor":
        if not FORMATS[spec.output.format].input_factors:
            yield Fault(
                field="quantization.smoothquant.without_norm",
                message=f"{spec.output.format} has no place for a factor on a linear's inputs: "
                "write without_norm: leave, or output.format: native",
            )
    elif asked and not any(group.smoothed for group in groups):
        yield Fault(
            field="quantization.method",
            message="smoothquant finds no norm whose output is read by linears that it is to "
            "smooth, by all of them and by nothing else: write rtn, hqq or gptq",
        )


def _choose(
    spec: JobSpec, info: LinearInfo, schemes: Schemes, found: tuple[int, Override] | None
) -> _Choice:
    """The last override that matches decides; none means the job's or plan's scheme and method."""
    quantization = spec.quantization
    planned = quantization.method == "plan"
    scheme = schemes.get(info.name) if planned else quantization.scheme_of()
    method = quantization.usual_method
    number = None
    if found is not None:
        number, override = found
        if override.skip or override.scheme is not None or not planned:
            planned = False
            scheme = None if override.skip else quantization.with_override(override)
        method = override.method or method
    layer = LayerPlan(
        name=info.name,
        out_features=info.out_features,
        in_features=info.in_features,
        scheme=scheme,
        method=method if scheme else None,
    )
    return _Choice(layer, info, number, planned)


def last_match(spec: JobSpec, name: str) -> tuple[int, Override] | None:
    numbered = list(enumerate(spec.quantization.overrides))
    return next((pair for pair in reversed(numbered) if matches(pair[1].match, name)), None)


def _head(
    spec: JobSpec, architecture: Architecture, schemes: Schemes
) -> tuple[LayerPlan | None, list[Fault]]:
    """The output head stays as it is unless an override or plan names it; embeddings always do."""
    faults = []
    embedding = architecture.embedding
    found = last_match(spec, embedding) if embedding else None
    if found and not found[1].skip and _names_exactly(found[1], architecture):
        faults.append(
            Fault(
                field=f"quantization.overrides.{found[0]}.match",
                message=f"'{embedding}' is an embedding, which no format here stores quantized: "
                "write skip: true or leave it out",
            )
        )
    head = architecture.head
    name = head.name if head else "lm_head"
    found = last_match(spec, name)
    if found is not None and not _names_exactly(found[1], architecture):
        found = None
    if schemes.get(name) is None if found is None else found[1].skip:
        return None, faults
    choice = _choose(spec, head or LinearInfo(name, 0, 0, "Linear"), schemes, found)
    if choice.layer.scheme is None:  # a plan leaves it dense; the override names a method alone
        return None, faults
    if refusal := _head_refusal(spec, head, choice.layer):
        key, message = refusal
        field = PLAN if found is None else f"quantization.overrides.{found[0]}.{key}"
        message += f", in an override of '{name}'" if found is None else ""
        return None, [*faults, Fault(field=field, message=message)]
    faults += [*_refused(spec, [choice]), *_indivisible([choice]), *_unsuited(spec, [choice])]
    return choice.layer, faults


def _head_refusal(
    spec: JobSpec, head: LinearInfo | None, layer: LayerPlan
) -> tuple[str, str] | None:
    """Why an output head cannot be quantized so, with the key that says it."""
    if head is None:
        shares = "the output head shares the embedding's weight: it cannot be quantized alone"
        return "match", shares
    if not FORMATS[spec.output.format].output_head:
        return "match", (
            f"transformers loads no quantized output head from {spec.output.format}: leave this "
            "out, or write output.format: compressed-tensors"
        )
    if layer.method not in UNCALIBRATED:
        return "method", (
            "the output head stands after the calibrated blocks: write method: rtn or hqq for it"
        )
    if layer.scheme and layer.scheme.static:
        return "scheme", (
            "the output head's inputs are not calibrated: write scheme: int8_dynamic for it"
        )
    return None


def _names_exactly(override: Override, architecture: Architecture) -> bool:
    """A pattern for all linears ('*') does not mean the head and embeddings too."""
    blocks = (info.name for block in architecture.blocks for info in block.linears())
    return not any(matches(override.match, name) for name in blocks)


def _unmatched(spec: JobSpec, architecture: Architecture) -> Iterator[Fault]:
    names = [info.name for block in architecture.blocks for info in block.linears()]
    outside = [architecture.embedding or "", "lm_head"]
    if architecture.head is not None:
        outside.append(architecture.head.name)
    for number, override in enumerate(spec.quantization.overrides):
        if not any(matches(override.match, name) for name in (*names, *outside)):
            yield Fault(
                field=f"quantization.overrides.{number}.match",
                message=f"'{override.match}' matches no layer: names look like '{names[0]}' "
                "and must match as a whole, so begin with '*' for any block",
            )


def _refused(spec: JobSpec, choices: list[_Choice]) -> Iterator[Fault]:
    form = FORMATS[spec.output.format]
    seen = set()
    for choice in choices:
        layer = choice.layer
        if layer.scheme is None:
            continue
        message = form.refusal(choice.info.kind, layer.scheme)
        message = message or form.shape_refusal(layer.scheme, layer.out_features, layer.in_features)
        if message and (choice.place("scheme"), message) not in seen:
            seen.add((choice.place("scheme"), message))
            where = choice.place("scheme")
            yield Fault(field=where, message=f"{message} (first: '{layer.name}')")


def _not_together(spec: JobSpec, layers: list[LayerPlan], planned: bool) -> Iterator[Fault]:
    """Schemes that the format cannot hold in one artifact; a plan's has a layer to be named."""
    refusal = FORMATS[spec.output.format].refusal_together
    together: set[Scheme] = set()
    for layer in layers:
        if layer.scheme is None or layer.scheme in together:
            continue
        together.add(layer.scheme)
        message = refusal(frozenset(together))
        if message and planned:
            yield Fault(field=PLAN, message=f"{message} (first: '{layer.name}')")
        elif message:
            yield Fault(field="quantization.symmetric", message=message)
        if message:
            return


def _indivisible(choices: Iterable[_Choice]) -> list[Fault]:
    """One fault per place in the job file, naming the group sizes that divide every width."""
    widths: dict[tuple[str, int], dict[int, str]] = {}
    all_widths: dict[tuple[str, int], set[int]] = {}
    for choice in choices:
        scheme, width = choice.layer.scheme, choice.layer.in_features
        if scheme is None or scheme.group_size is None:
            continue
        key = (choice.place("group_size"), scheme.group_size)
        all_widths.setdefault(key, set()).add(width)
        if width % scheme.group_size:
            widths.setdefault(key, {}).setdefault(width, choice.layer.name)
    faults = []
    for (field, size), offenders in widths.items():
        common = math.gcd(*all_widths[field, size])
        fitting = ", ".join(str(s) for s in dividing_group_sizes(common))
        width, name = next(iter(offenders.items()))
        faults.append(
            Fault(
                field=field,
                message=f"groups of {size} do not divide the {width} inputs of '{name}': "
                f"write {f'one of {fitting}, or ' if fitting else ''}channel",
            )
        )
    return faults


def _unsuited(spec: JobSpec, choices: Iterable[_Choice]) -> Iterator[Fault]:
    """Methods that a plan's schemes do not take: those that the job names, its spec has checked."""
    for choice in choices:
        scheme, method = choice.layer.scheme, choice.layer.method
        if not choice.planned or scheme is None or method is None:
            continue
        where = "plan.rounding" if choice.override is None else f"overrides.{choice.override}"
        try:
            spec.quantization.refuse_method(scheme, method)
        except ValueError as error:
            message = f"'{choice.layer.name}', as the plan has it: {error}"
            yield Fault(field=f"quantization.{where}", message=message)
        if scheme.static and spec.calibration is None:
            message = (
                f"'{choice.layer.name}': {scheme.name} finds its activation scales in texts: add a "
                "calibration section"
            )
            yield Fault(field=PLAN, message=message)


def _split_fusions(spec: JobSpec, choices: dict[str, _Choice]) -> Iterator[Fault]:
    """Engines load q/k/v, and gate/up, as one matrix: one scheme for all of them, or none."""
    families: dict[tuple[str, frozenset[str]], list[_Choice]] = {}
    for name, choice in choices.items():
        parent, _, leaf = name.rpartition(".")
        for fused in FORMATS[spec.output.format].fused:
            if leaf in fused:
                families.setdefault((parent, fused), []).append(choice)
    seen = set()
    for (parent, fused), members in families.items():
        if len({member.layer.scheme for member in members}) == 1:
            continue
        numbers = [m.override for m in members if m.override is not None and not m.planned]
        number = max(numbers, default=None)
        if (number, fused) in seen:
            continue
        seen.add((number, fused))
        leaves = "/".join(sorted(fused, key=[m.layer.name.split(".")[-1] for m in members].index))
        splits = f"splits {leaves} of '{parent}', which engines load as one matrix"
        if number is None:
            yield Fault(field=PLAN, message=f"{splits}: plan anew, with one choice for all of them")
        else:
            yield Fault(
                field=f"quantization.overrides.{number}.match",
                message=f"{splits}: match all of them or none",
            )
