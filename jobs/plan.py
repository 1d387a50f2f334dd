"""`method: plan`: which scheme each linear takes, by a document or by what is to be measured.

    plan: {path: plan-NVIDIA_H200.json}

    plan:
      candidates: [default, int4]
      profile: mix                        # or calls: [{tokens: 1, times: 64}, {tokens: 512}]
      budgets: {error: 0.5, bytes: 4.5GiB}
      end_to_end: auto                    # or true, false

Without a path `quantfleet plan` measures, and leaves its plans in the job's folder in the store. A
job follows one of them, or makes an artifact by each:

    plan: {each_kind: true}
"""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from jobs.section import FilePath, PlanPlace, Section

# As quantcore/autoquant has them (CLASSES, PROFILES): to import that takes a second
CandidateClass = Literal["default", "int4", "float8", "all"]
NamedProfile = Literal["decode_1", "decode_16", "prefill_2048", "mix", "recorded"]

# What is to be planned, and says nothing beside a plan that is made already
_ASKED = (
    "candidates",
    "profile",
    "calls",
    "least",
    "budgets",
    "held_out",
    "end_to_end",
    "threads",
)
_UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


class CallsSpec(Section):
    """How often a linear is called with so many tokens."""

    tokens: Annotated[int, Field(gt=0)]
    times: Annotated[float, Field(gt=0)] = 1.0


class BudgetsSpec(Section):
    """The most that a whole plan may have; what is not named may be anything."""

    error: Annotated[float, Field(ge=0)] | None = None
    bytes: (
        Annotated[int, Field(gt=0)]
        | Annotated[str, Field(pattern=r"^\d+(\.\d+)?\s*[KMGT]iB$")]
        | None
    ) = None
    time_us: Annotated[float, Field(ge=0)] | None = None

    def num_bytes(self) -> float | None:
        if self.bytes is None or isinstance(self.bytes, int):
            return self.bytes
        return float(self.bytes[:-3]) * _UNITS[self.bytes[-3:]]


class PlanSpec(Section):
    path: PlanPlace | None = None  # of a plan document: a file here, or at s3://bucket/path
    rounding: Literal["rtn", "gptq", "hqq"] = "gptq"  # of all that the plan does not leave dense
    other_hardware: bool = False  # whether it may be made for another kind than the workers'
    each_kind: bool = False  # an artifact by every plan in the job's folder, from one calibration
    candidates: tuple[CandidateClass, ...] = ("default",)
    # what linears are called with; recorded: what the calibration hands them
    profile: NamedProfile = "mix"
    calls: tuple[CallsSpec, ...] = ()  # instead of a profile
    least: Literal["time", "error"] = "time"  # within the budgets
    budgets: BudgetsSpec = BudgetsSpec()
    held_out: FilePath | None = None  # a text that whole models are checked by
    # whether a few plans run as whole models, one of which is kept; auto: where there is room
    end_to_end: Literal["auto"] | bool = "auto"
    threads: Annotated[int, Field(gt=0)] | None = None  # of a CPU that serves; None: a worker's

    @model_validator(mode="after")
    def _made_or_to_be_made(self) -> Self:
        usual = PlanSpec.model_construct()
        changed = [key for key in _ASKED if getattr(self, key) != getattr(usual, key)]
        if self.path is not None and changed:
            raise ValueError(
                f"the plan at path is made already: drop {changed[0]}, or drop path and run "
                "quantfleet plan"
            )
        if self.each_kind and self.path is not None:
            raise ValueError(
                "each_kind follows all plans in the job's folder, and path names one: drop one of "
                "the two"
            )
        if self.each_kind and self.other_hardware:
            raise ValueError("each_kind is for plans of other hardware, too: drop other_hardware")
        if self.end_to_end is True and self.least != "time":
            raise ValueError(
                "end_to_end: plans that run are told apart by time: write least: time, or drop it"
            )
        if not self.candidates:
            raise ValueError("candidates: none: write default")
        counts = [one.tokens for one in self.calls]
        if len(set(counts)) < len(counts):
            raise ValueError("calls: a number of tokens stands twice: keep one")
        if self.calls and self.profile != usual.profile:
            raise ValueError("calls are a profile of their own: drop one of the two")
        return self
