"""What was found of a model and not of hardware: JSON that is merged and never computed twice.

    {"version": 1, "findings": [
    {"what": "error", "of": "3f6c...", "under": "int4 sym g64", "value": 0.0123},
    ...
    ]}

    error        of a linear's outputs under a scheme (sensitivity.py); its key is of the weight and
                 of the sample of its inputs
    divergence   of a whole model (divergence.py), under one scheme, or "plan"; its key is of the
                 model, the held-out inputs, what each linear takes, and ranges of static schemes

Keys are of contents (digests.py): another model, sample or held-out text has others, and nothing is
told to be stale by hand. One finding a line, sorted. `parse` leaves out and names what this version
does not know.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from quantcore.autoquant.candidates import candidate_of
from quantcore.errors import DAMAGE, StoreError, why_damaged

VERSION = 1  # raised with a formula that gives other values
PLAN = "plan"  # what a model is under, where no one scheme is


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Finding:
    what: str
    of: str
    under: str

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if type(value) is not str or not value:
                raise ValueError(f"{name}: {value!r} is not text")


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    of: Mapping[Finding, float] = field(default_factory=dict)
    ignored: tuple[str, ...] = field(default=(), compare=False)  # what could not be used, and why


class Known:
    """Findings that grow."""

    def __init__(self, findings: Findings) -> None:
        self._of, self._ignored = dict(findings.of), findings.ignored

    def __contains__(self, finding: Finding) -> bool:
        return finding in self._of

    def __getitem__(self, finding: Finding) -> float:
        return self._of[finding]

    def add(self, found: Mapping[Finding, float]) -> None:
        self._of.update(found)

    def all(self) -> Findings:
        return Findings(of=dict(self._of), ignored=self._ignored)


def merged(many: Iterable[Findings]) -> Findings:
    """All that any of them has; of two values, which differ in their last bits, the larger."""
    together: dict[Finding, float] = {}
    ignored: dict[str, None] = {}
    for one in many:
        ignored |= dict.fromkeys(one.ignored)
        for finding, value in one.of.items():
            together[finding] = max(value, together.get(finding, value))
    return Findings(of=together, ignored=tuple(sorted(ignored)))


def written(findings: Findings) -> str:
    lines = [
        json.dumps({**asdict(finding), "value": findings.of[finding]}, allow_nan=False)
        for finding in sorted(findings.of)
    ]
    return f'{{"version": {VERSION}, "findings": [\n' + ",\n".join(lines) + "\n]}\n"


def parse(text: str) -> Findings:
    """What `written` gave. Raises StoreError where the text is damaged or of another version."""
    try:
        document = json.loads(text)
        if document["version"] != VERSION:
            raise StoreError(
                f"findings: version {document['version']} where this reads {VERSION}: delete them, "
                "or run the version that wrote them"
            )
        of: dict[Finding, float] = {}
        ignored: list[str] = []
        for line in document["findings"]:
            finding, value = _read_line(line)
            if finding in of:
                raise ValueError(f"it stands twice: {line}")
            if why := _unknown(finding):
                ignored.append(f"a finding is ignored: {why}")
            else:
                of[finding] = value
    except DAMAGE as error:
        why = why_damaged(error)
        raise StoreError(f"findings: damaged ({why}): delete them to have them anew") from None
    return Findings(of=of, ignored=tuple(ignored))


def _read_line(line: Mapping[str, Any]) -> tuple[Finding, float]:
    rest = dict(line)
    value = rest.pop("value")
    if type(value) not in (int, float) or not math.isfinite(value) or value < 0:
        raise ValueError(f"value: {value!r} is not a finite number from 0")
    return Finding(**rest), float(value)


def _unknown(finding: Finding) -> str | None:
    labels: Mapping[str, Callable[[str], str]] = {
        "error": lambda under: f"{under} plain",
        "divergence": lambda under: "dense" if under == PLAN else f"{under} plain",
    }
    if finding.what not in labels:
        return f"nothing is called '{finding.what}'"
    try:
        candidate_of(labels[finding.what](finding.under))
    except ValueError as error:
        return str(error)
    return None
