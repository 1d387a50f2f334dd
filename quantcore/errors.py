"""Every error a user can meet, and the exit code each ends with.

QuantfleetError
 ├─ SpecError           2    the job file or a command's arguments
 ├─ SourceError         3    the model or the texts a job reads
 ├─ StoreError          3    where artifacts are kept
 │   └─ LeaseError             another driver has the job
 ├─ ResourceError       4    workers, devices and memory
 └─ QuantizationError   5    the numbers themselves
     └─ SolveError           one Hessian that GPTQ cannot use

Our own bugs stay assertions and end as tracebacks.
"""

from collections.abc import Sequence
from dataclasses import dataclass


class QuantfleetError(Exception):
    """A problem whose message is meant to be read by the user, complete as it stands."""

    exit_code = 1


class SpecError(QuantfleetError):
    exit_code = 2


class SourceError(QuantfleetError):
    exit_code = 3


class StoreError(QuantfleetError):
    exit_code = 3


class LeaseError(StoreError):
    """Another driver is at work on the job, or has taken it over."""


class ResourceError(QuantfleetError):
    exit_code = 4


class QuantizationError(QuantfleetError):
    exit_code = 5


class SolveError(QuantizationError):
    """The Hessian stayed indefinite at every damping that was tried."""


BY_NAME: dict[str, type[QuantfleetError]] = {
    kind.__name__: kind
    for kind in (
        SpecError,
        SourceError,
        StoreError,
        LeaseError,
        ResourceError,
        QuantizationError,
        SolveError,
    )
}


# what reading a JSON document may raise, where it is not what it should be
DAMAGE = (LookupError, TypeError, ValueError, AttributeError, OverflowError, RecursionError)


def why_damaged(error: Exception) -> str:
    return f"no {error}" if isinstance(error, KeyError) else str(error)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One thing wrong with a job: where it stands, what is wrong, what to write instead."""

    field: str  # dotted path in the job file, as quantization.group_size
    message: str
    kind: type[QuantfleetError] = SpecError
    line: int | None = None  # 1-based
    column: int | None = None  # 1-based


class JobFaults(QuantfleetError):  # noqa: N818 - the many faults of one job
    """All the faults of one job at once; the lowest of their exit codes ends it."""

    def __init__(self, path: str, faults: Sequence[Fault]) -> None:
        assert faults
        self.path = path
        self.faults = tuple(faults)
        self.exit_code = min(fault.kind.exit_code for fault in self.faults)
        super().__init__("\n".join(self.lines()))

    def lines(self) -> list[str]:
        return [f"{self._place(fault)}{fault.field}: {fault.message}" for fault in self.faults]

    def _place(self, fault: Fault) -> str:
        if fault.line is None:
            return f"{self.path}: "
        return f"{self.path}:{fault.line}:{fault.column}: "
