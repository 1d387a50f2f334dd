"""What is wrong with a job, collected: so that all of it is reported at once."""

import dataclasses
from collections.abc import Callable
from typing import TypeVar

from jobs.load import Document, Location
from quantcore.errors import Fault, QuantfleetError

T = TypeVar("T")


class Findings:
    """Faults so far, each given its place in the job file."""

    def __init__(self, document: Document, faults: list[Fault]) -> None:
        self._document = document
        self.faults = faults

    def add(self, *faults: Fault) -> None:
        for fault in faults:
            parts = fault.field.split(".")
            location: Location = tuple(int(p) if p.isdigit() else p for p in parts)
            if any(known.field == fault.field for known in self.faults):
                continue
            line, column = self._document.place(location)
            self.faults.append(dataclasses.replace(fault, line=line, column=column))

    def attempt(self, field: str, action: Callable[[], T]) -> T | None:
        """The action's result; its error, if it raises one of ours, becomes a fault of `field`."""
        try:
            return action()
        except QuantfleetError as error:
            named, _, rest = str(error).partition(": ")
            own = rest and " " not in named and "." in named and "/" not in named
            kind = type(error)
            message = rest if own else str(error)
            self.add(Fault(field=named if own else field, message=message, kind=kind))
            return None
