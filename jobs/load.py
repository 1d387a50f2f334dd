"""Read a job file and say where in it each fault stands."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from jobs.spec import JobSpec
from quantcore.errors import Fault, JobFaults

Location = tuple[str | int, ...]

_KEY_TAGS = {"tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"}
_PLAIN_WORDS = {
    "extra_forbidden": "unknown key",
    "missing": "missing: this key is required",
}


@dataclass(frozen=True, slots=True)
class Document:
    """A parsed job file and where each of its values stands."""

    path: Path
    data: dict[str, Any]
    places: dict[Location, tuple[int, int]]  # 1-based line and column

    def place(self, location: Location) -> tuple[int, int] | tuple[None, None]:
        """The place of a value, or of the nearest thing around it that the file has."""
        for length in range(len(location), 0, -1):
            if location[:length] in self.places:
                return self.places[location[:length]]
        return None, None

    def fault(self, location: Location, message: str, **more: Any) -> Fault:
        line, column = self.place(location)
        field = ".".join(str(part) for part in location) or "job"
        return Fault(field=field, message=message, line=line, column=column, **more)


def read_document(path: Path) -> Document:
    """Parse the YAML; raise JobFaults if it is not a mapping or not YAML at all."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise JobFaults(str(path), [Fault(field="job", message=f"cannot read: {reason}")]) from None
    places: dict[Location, tuple[int, int]] = {}
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        data = yaml.safe_load(text)
        wrong = _collect_places(root, (), places)
    except RecursionError:
        fault = Fault(field="job", message="nested too deeply: does an anchor hold itself?")
        raise JobFaults(str(path), [fault]) from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date or number that is none
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or str(error)
        line, column = (mark.line + 1, mark.column + 1) if mark else (None, None)
        fault = Fault(field="job", message=f"not YAML: {problem}", line=line, column=column)
        raise JobFaults(str(path), [fault]) from None
    document = Document(path, data if isinstance(data, dict) else {}, places)
    if not isinstance(data, dict):
        raise JobFaults(str(path), [document.fault((), "write a mapping of keys, as in README.md")])
    if wrong:
        raise JobFaults(str(path), [document.fault(at, message) for at, message in wrong])
    data.setdefault("name", path.stem)
    return document


def validate(document: Document) -> tuple[JobSpec | None, list[Fault]]:
    """The spec and every fault in it.

    With faults, the spec is what remains when the faulty keys are left out, or None if too
    little remains: enough to look for the faults that only the model and the texts can show.
    """
    try:
        return JobSpec.model_validate_json(json.dumps(document.data, default=str)), []
    except ValidationError as error:
        faults = [_fault(document, item) for item in error.errors()]
        remains = _without(document.data, [item["loc"] for item in error.errors()])
    try:
        return JobSpec.model_validate_json(json.dumps(remains, default=str)), _unique(faults)
    except ValidationError:
        return None, _unique(faults)


def resolve_paths(spec: JobSpec, base: Path) -> JobSpec:
    """The same spec with every path absolute; relative ones start at the job file's folder."""

    def absolute(path: Path | None) -> Path | None:
        return None if path is None else (base / _expanded(path)).resolve()

    def place(url: str) -> str:
        return url if url.startswith("s3://") else str(absolute(Path(url.removeprefix("file://"))))

    changes: dict[str, Any] = {
        "model": spec.model.model_copy(update={"path": place(spec.model.path)})
    }
    plan = spec.quantization.plan
    if plan is not None:
        places = {
            "path": plan.path and place(plan.path),
            "held_out": absolute(plan.held_out),
        }
        named = {"plan": plan.model_copy(update=places)}
        changes["quantization"] = spec.quantization.model_copy(update=named)
    if spec.calibration is not None:
        texts: dict[str, Any] = {
            "text": absolute(spec.calibration.text),
            "jsonl": absolute(spec.calibration.jsonl),
            "task_folder": absolute(spec.calibration.task_folder),
        }
        if spec.calibration.statistics is not None:
            texts["statistics"] = place(spec.calibration.statistics)
        changes["calibration"] = spec.calibration.model_copy(update=texts)
    if spec.evaluation is not None:
        files = {
            "text": absolute(spec.evaluation.text),
            "task_folder": absolute(spec.evaluation.task_folder),
        }
        changes["evaluation"] = spec.evaluation.model_copy(update=files)
    changes["output"] = spec.output.model_copy(update={"store": place(spec.output.store)})
    return spec.model_copy(update=changes)


def _expanded(path: Path) -> Path:
    """`~` and `~user` as folders; the path of a user that is not there is missing all the same."""
    try:
        return path.expanduser()
    except RuntimeError:
        return path


def _fault(document: Document, item: Any) -> Fault:
    location: Location = tuple(
        part for part in item["loc"] if not _is_union_branch(part, item["loc"])
    )
    kind = item["type"]
    message = _PLAIN_WORDS.get(kind, item["msg"].removeprefix("Value error, "))
    if kind == "extra_forbidden":
        message += f": write one of {', '.join(_known_keys(location[:-1]))}"
    elif kind in {"missing", "value_error"}:
        pass  # our own messages are whole: a store URL with credentials must not be shown again
    elif not isinstance(item["input"], dict | list):
        message = f"{message} (got {item['input']!r})"
        if kind == "float_type" and re.fullmatch(r"\d+(\.\d*)?e[+-]?\d+", str(item["input"])):
            message += ": YAML reads it as a word; write a point and a sign, as in 1.0e-2"
    return document.fault(location, message)


def _is_union_branch(part: str | int, location: Sequence[str | int]) -> bool:
    """pydantic adds the name of the union's branch it tried: no key of ours looks like that."""
    if not isinstance(part, str) or part is not location[-1]:
        return False
    return part in ("int", "float") or part.startswith(("constrained-", "literal["))


def _known_keys(location: Location) -> list[str]:
    model: Any = JobSpec
    for part in location:
        if isinstance(part, int):
            continue
        field = model.model_fields[part]
        candidates = [field.annotation, *getattr(field.annotation, "__args__", ())]
        model = next(c for c in candidates if hasattr(c, "model_fields"))
    return list(model.model_fields)


def _unique(faults: list[Fault]) -> list[Fault]:
    """One fault per place: a union reports each branch that it tried."""
    by_field: dict[str, Fault] = {}
    for fault in faults:
        known = by_field.get(fault.field)
        if known is None:
            by_field[fault.field] = fault
        elif known.message != fault.message:
            message = f"{known.message}; or: {fault.message}"
            by_field[fault.field] = Fault(
                field=fault.field, message=message, line=fault.line, column=fault.column
            )
    return list(by_field.values())


def _without(data: Any, locations: list[Any]) -> Any:
    """A copy of the data less what stands at the locations (or around them, where it is plain)."""
    pruned = json.loads(json.dumps(data, default=str))
    for location in locations:
        parent: Any = pruned
        for depth, part in enumerate(location, start=1):
            if not isinstance(parent, dict | list):
                break
            try:
                inner = parent[part]
            except (KeyError, IndexError, TypeError):
                break
            if isinstance(parent, dict) and (
                depth == len(location) or not isinstance(inner, dict | list)
            ):
                del parent[part]
                break
            parent = inner
    return pruned


def _collect_places(
    node: Any, location: Location, places: dict[Location, tuple[int, int]]
) -> list[tuple[Location, str]]:
    """Note where each value stands; the result is what is wrong with the keys as such."""
    wrong: list[tuple[Location, str]] = []
    if isinstance(node, yaml.MappingNode):
        seen: set[Location] = set()
        for key, value in node.value:
            below = (*location, str(key.value))
            if below in seen:
                wrong.append((below, "written twice: keep one"))
            elif key.tag not in _KEY_TAGS:
                wrong.append((below, "unknown key: keys are words"))
            seen.add(below)
            places[below] = (key.start_mark.line + 1, key.start_mark.column + 1)
            wrong += _collect_places(value, below, places)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            below = (*location, index)
            places[below] = (value.start_mark.line + 1, value.start_mark.column + 1)
            wrong += _collect_places(value, below, places)
    return wrong
