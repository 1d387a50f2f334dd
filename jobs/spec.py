"""The job file: what a user writes, frozen, with every unknown key refused.

Checks here look at one field or at fields beside each other. What needs the model, the texts or
the machine to be looked at is checked in orchestrator/checks.py, before any work starts.
"""

from collections.abc import Iterator
from typing import Annotated, Literal, Self

from pydantic import (
    AfterValidator,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from jobs.match import compile_pattern
from jobs.plan import PlanSpec
from jobs.section import FilePath, ModelPlace, Section, StoreUrl
from quantcore.schemes import SCHEME_KINDS, IntegerGrid, Scheme, resolve_scheme

Method = Literal["rtn", "gptq", "hqq", "smoothquant"]
JobMethod = Literal["rtn", "gptq", "hqq", "smoothquant", "plan"]
UNCALIBRATED = ("rtn", "hqq")  # methods that look at weights alone
Dtype = Literal["float32", "bfloat16", "float16"]
ComputeDtype = Literal["auto", "float32", "bfloat16", "float16"]
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"  # of a job
Span = Annotated[int, Field(gt=0)] | Literal["channel", "tensor"]


def _known_scheme(name: str) -> str:
    if name not in SCHEME_KINDS:
        raise ValueError(f"unknown scheme '{name}': write one of {', '.join(SCHEME_KINDS)}")
    return name


def _pattern(text: str) -> str:
    compile_pattern(text)
    return text


SchemeName = Annotated[str, AfterValidator(_known_scheme)]
Pattern = Annotated[str, AfterValidator(_pattern)]


class ModelSpec(Section):
    path: ModelPlace  # a Hugging Face folder, here or at s3://bucket/path, or one .gguf file
    dtype: Dtype = "float32"  # what a GGUF file is dequantized to; folders keep their own


class GptqSpec(Section):
    damping: Annotated[float, Field(gt=0, lt=1)] = 0.01
    act_order: bool = True
    block_columns: Annotated[int, Field(gt=0)] = 128


class HqqSpec(Section):
    norm: Annotated[float, Field(ge=0.1, le=1)] = 0.7  # p; to the nearest 1/256
    # in steps of a group's grid; None: 5 where a zero point is fitted, 1 where a scale is
    beta: Annotated[float, Field(gt=0, le=1e6)] | None = None
    growth: Annotated[float, Field(ge=1, le=10)] = 1.01  # of beta, by iteration
    iterations: Annotated[int, Field(gt=0, le=1000)] = 20


class SmoothquantSpec(Section):
    alpha: Annotated[float, Field(ge=0, le=1)] | Literal["search"] = "search"  # by LinearGroup
    rounding: Literal["rtn", "gptq", "hqq"] = "rtn"  # of the smoothed weights
    # linears with no norm of their own before them: left as they are, or a factor on their inputs
    without_norm: Literal["leave", "input_factor"] = "leave"


class Override(Section):
    """Another scheme or method for the linears whose names match, or none at all."""

    match: Pattern  # a glob over module names, or re: and a regular expression
    skip: bool = False
    scheme: SchemeName | None = None
    group_size: Span | None = None
    symmetric: bool | None = None
    zero_point: Literal["int", "float"] | None = None
    method: Method | None = None

    @model_validator(mode="after")
    def _says_one_thing(self) -> Self:
        changes = (self.scheme, self.group_size, self.symmetric, self.zero_point, self.method)
        if self.skip and any(change is not None for change in changes):
            raise ValueError("skip: true leaves the layer as it is: drop skip or the other keys")
        if not self.skip and all(change is None for change in changes):
            raise ValueError("changes nothing: write skip: true, a scheme, a group_size, ...")
        if self.scheme is not None:
            symmetric = self.symmetric is not False and self.zero_point is None
            resolve_scheme(self.scheme, self.group_size, symmetric, self.zero_point)
        return self


class QuantizationSpec(Section):
    method: JobMethod = "gptq"
    # None: each linear's as the plan says; method stands above for this to be looked at beside it
    scheme: Annotated[SchemeName | None, Field(validate_default=True)] = None
    group_size: Span | None = None  # None: the scheme's usual one
    symmetric: bool = True
    zero_point: Literal["int", "float"] | None = None  # of a grid that is not symmetric; None: int
    range: Literal["search", "minmax"] = "search"  # how GPTQ's scales are set
    gptq: GptqSpec = GptqSpec()
    hqq: HqqSpec = HqqSpec()
    smoothquant: SmoothquantSpec = SmoothquantSpec()
    plan: PlanSpec | None = None
    overrides: tuple[Override, ...] = ()

    @field_validator("scheme")
    @classmethod
    def _said_once(cls, scheme: str | None, info: ValidationInfo) -> str | None:
        planned = info.data.get("method") == "plan"
        if scheme is None and not planned:
            raise PydanticCustomError("missing", "missing")
        if scheme is not None and planned:
            raise ValueError("the plan says the scheme of every linear: drop this key")
        return scheme

    @model_validator(mode="after")
    def _legal(self) -> Self:
        self._refuse_beside_plan()
        for scheme, method in self.choices():
            self.refuse_method(scheme, method)
        return self

    def _refuse_beside_plan(self) -> None:
        if self.method != "plan":
            if self.plan is not None:
                raise ValueError("plan is for method: plan: write that, or drop the section")
            return
        if self.group_size is not None or self.zero_point is not None or not self.symmetric:
            raise ValueError(
                "the plan says the scheme of every linear: drop group_size, symmetric, zero_point"
            )
        for number, one in enumerate(self.overrides):
            changes = (one.group_size, one.symmetric, one.zero_point)
            if one.scheme is None and any(change is not None for change in changes):
                raise ValueError(
                    f"overrides.{number}: group_size, symmetric and zero_point change the job's "
                    "scheme, and a plan has many: write scheme beside them"
                )

    def refuse_method(self, scheme: Scheme, method: Method) -> None:
        """Raises ValueError where a linear of this scheme cannot be quantized so."""
        _refuse_smoothing(method, scheme)
        _refuse_fitting(self.smoothquant.rounding if method == "smoothquant" else method, scheme)

    def choices(self) -> Iterator[tuple[Scheme, Method]]:
        """Every scheme and method that the job names; without those of a plan."""
        if self.scheme is not None:
            yield self.scheme_of(), self.usual_method
        for override in self.overrides:
            if not override.skip and (override.scheme or self.scheme):
                yield self.with_override(override), override.method or self.usual_method

    @property
    def usual_method(self) -> Method:
        """Of all linears that no override gives another."""
        if self.method != "plan":
            return self.method
        return self.planning.rounding

    @property
    def planning(self) -> PlanSpec:
        """Of method: plan. Without the section all is as usual: measured, and left in the store."""
        return self.plan or PlanSpec()

    def scheme_of(self) -> Scheme:
        assert self.scheme is not None, "a plan has no one scheme"
        return resolve_scheme(self.scheme, self.group_size, self.symmetric, self.zero_point)

    def with_override(self, override: Override) -> Scheme:
        """The scheme under an override: a new scheme starts from its own usual group size."""
        symmetric, zero_point = override.symmetric, override.zero_point
        if override.scheme is None or override.scheme == self.scheme:
            assert self.scheme is not None, "a plan's override names a scheme, or changes none"
            symmetric = self.symmetric if symmetric is None else symmetric
            if not symmetric and zero_point is None:
                zero_point = self.zero_point
            size = override.group_size or self.group_size
            return resolve_scheme(self.scheme, size, symmetric, zero_point)
        known = SCHEME_KINDS[override.scheme].zero_points
        if symmetric is None:
            symmetric = (self.symmetric or known == ("none",)) and zero_point is None
        if not symmetric and zero_point is None and self.zero_point in known:
            zero_point = self.zero_point
        return resolve_scheme(override.scheme, override.group_size, symmetric, zero_point)


def _refuse_smoothing(method: Method, scheme: Scheme) -> None:
    if method == "smoothquant" and scheme.activations is None:
        suited = " or ".join(name for name, kind in SCHEME_KINDS.items() if kind.activations)
        raise ValueError(
            f"method smoothquant helps activations to be rounded, which {scheme.name} leaves as "
            f"they are: write scheme: {suited}, or another method"
        )


def _refuse_fitting(rounding: Method, scheme: Scheme) -> None:
    if rounding == "hqq" and not isinstance(scheme.grid, IntegerGrid):
        whole = (name for name, k in SCHEME_KINDS.items() if isinstance(k.weights, IntegerGrid))
        raise ValueError(
            f"hqq fits grids of whole codes, and {scheme.name} has none: write scheme: "
            f"{' or '.join(whole)}, or another method"
        )


class CalibrationSpec(Section):
    """Sequences of token ids: windows of a text, rows of a jsonl file, or documents of tasks."""

    text: FilePath | None = None
    jsonl: FilePath | None = None
    field: str = "text"  # of each jsonl row: a text, or a list of token ids used as it is
    tasks: tuple[str, ...] = ()  # lm-eval tasks by name: documents in the words of their requests
    task_folder: FilePath | None = None  # more lm-eval task files
    limit: Annotated[int, Field(gt=0)] | None = None  # documents per task: its first ones
    # None: the first of these that lm-eval does not measure by, if the task has one
    split: Literal["training", "validation", "test"] | None = None
    # of documents with fewer tokens than `length`; None: pad those of tasks, join texts of a jsonl
    short: Literal["pad", "drop", "join"] | None = None
    sequences: Annotated[int, Field(gt=0)] = 128
    length: Annotated[int, Field(gt=1)] = 512
    seed: Annotated[int, Field(ge=0)] = 0
    max_characters: Annotated[int, Field(gt=0)] = 4_000_000  # of the text that is read at all
    shards: Annotated[int, Field(gt=0)] = 1  # runs of blocks calibrated at once; 1 is the paper's
    keep_statistics: bool = False  # Hessians and ranges in the store, for later jobs
    statistics: StoreUrl | None = None  # STORE/NAME of a job that kept them, instead of texts

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        named = [self.text, self.jsonl, self.statistics, self.tasks or None]
        if sum(source is not None for source in named) != 1:
            raise ValueError(
                "name one source of texts: write either text or jsonl, or tasks, or a job's "
                "statistics"
            )
        if self.statistics is not None and self != CalibrationSpec.model_construct(
            statistics=self.statistics
        ):
            raise ValueError(
                "statistics were made from the texts of their own job: drop the other keys"
            )
        about_tasks = [key for key in ("task_folder", "limit", "split") if getattr(self, key)]
        if about_tasks and not self.tasks:
            raise ValueError(f"{about_tasks[0]} is about lm-eval tasks: name tasks, or drop it")
        if self.short is not None and self.text is not None:
            raise ValueError("a text is cut into whole windows: drop short, or name jsonl or tasks")
        return self


class WorkersSpec(Section):
    count: Annotated[int, Field(gt=0)] | None = None  # None: what this machine carries
    kind: Literal["auto", "cpu", "cuda", "xpu", "mixed"] = "auto"
    cpus: Annotated[float, Field(gt=0)] | None = None  # per worker; None: as many as threads
    threads: Annotated[int, Field(gt=0)] = 1  # per worker; part of the contract of bits
    losses_per_day: Annotated[float, Field(ge=0)] = 1.0  # of a worker: how often to keep states
    probe: bool = False  # try the worst block of a calibrated job before all else
    memory: Annotated[str, Field(pattern=r"^\d+(\.\d+)?\s*(KiB|MiB|GiB|TiB)$")] | None = None

    def memory_bytes(self) -> int | None:
        if self.memory is None:
            return None
        unit = self.memory[-3:]
        return int(
            float(self.memory[:-3]) * 1024 ** ("KiB", "MiB", "GiB", "TiB").index(unit) * 1024
        )


class OutputSpec(Section):
    store: StoreUrl  # a folder (relative to the job file) or s3://bucket/path
    format: Literal["compressed-tensors", "gptq", "gptq_v2", "native"] = "compressed-tensors"
    conditional_writes: bool = True  # false: for a store that has none; one driver at a time


class EvaluationSpec(Section):
    text: FilePath | None = None  # word and byte perplexity on a local text
    max_characters: Annotated[int, Field(gt=0)] = 40_000
    tasks: tuple[str, ...] = ()  # lm-eval tasks by name
    task_folder: FilePath | None = None  # more lm-eval task files
    limit: Annotated[int, Field(gt=0)] | None = None  # documents per task
    length: Annotated[int, Field(gt=1)] = 1024  # tokens of context
    baselines: tuple[Literal["original", "rtn"], ...] = ("original",)

    @model_validator(mode="after")
    def _measures_something(self) -> Self:
        if self.text is None and not self.tasks:
            raise ValueError("measures nothing: name a text, or lm-eval tasks")
        return self


class JobSpec(Section):
    name: Annotated[str, Field(pattern=NAME)]
    model: ModelSpec
    quantization: QuantizationSpec
    compute_dtype: ComputeDtype = "auto"  # bfloat16 where all devices multiply in it, else float32
    calibration: CalibrationSpec | None = None
    workers: WorkersSpec = WorkersSpec()
    output: OutputSpec
    evaluation: EvaluationSpec | None = None

    @model_validator(mode="after")
    def _calibrated_when_needed(self) -> Self:
        if self.calibration is not None:
            return self
        others = (override.method for override in self.quantization.overrides)
        for method in (self.quantization.usual_method, *others):
            if method is not None and method not in UNCALIBRATED:
                raise ValueError(
                    f"method {method} needs texts: add a calibration section, or write rtn or hqq"
                )
        for scheme, _ in self.quantization.choices():
            if scheme.static:
                raise ValueError(
                    f"{scheme.name} finds its activation scales in texts: add a calibration section"
                )
        return self
