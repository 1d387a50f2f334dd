"""lm-eval's task files: found by name, looked at without their data, and used without noise."""

import contextlib
import functools
import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any


def task_manager(names: Iterable[str], *folders: Path | None) -> Any:
    """lm-eval's index of the task files in the folders; with its own, unless those have all names.

    Its own are thousands, which take seconds to read.
    """
    from lm_eval.tasks import TaskManager

    paths = [str(folder) for folder in folders if folder is not None]
    if not paths:
        return _packaged()
    own = TaskManager(include_path=paths, include_defaults=False)
    complete = all(_complete(name, own.task_index) for name in names)
    return own if complete else TaskManager(include_path=paths)


def unknown_tasks(names: Iterable[str], folder: Path | None) -> list[str]:
    """The names, of tasks or of groups of them, that lm-eval has no file for."""
    names = list(names)
    if not names:
        return []
    with quiet():
        known = set(task_manager(names, folder).all_tasks)
    return [name for name in names if name not in known]


def settings_of(names: Iterable[str], folder: Path | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every task that the names stand for and what its file says; groups and tags are followed."""
    names = list(names)
    if not names:
        return
    with quiet():
        index = task_manager(names, folder).task_index
    for name in names:
        yield from _settings(name, {}, index, frozenset())


def _settings(
    name: str, over: Mapping[str, Any], index: Mapping[str, Any], above: frozenset[str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    entry = index.get(name)
    if name in above or (entry is None and not over):
        return
    settings = {**((entry and entry.cfg) or {}), **over}
    members = _members(entry, settings)
    if members is None:
        yield name, settings
        return
    tag = entry is not None and entry.kind.name == "TAG"
    handed_down = {k: v for k, v in settings.items() if tag or k not in {"group", "task"}}
    for member in members:
        own = member if isinstance(member, dict) else {}
        yield from _settings(_name(member), {**handed_down, **own}, index, above | {name})


def _complete(
    member: str | dict[str, Any], index: Mapping[str, Any], above: frozenset[str] = frozenset()
) -> bool:
    """Whether all that a name, or a group within a group, stands for is in the index."""
    name = _name(member)
    entry = index.get(name)
    settings = {**((entry and entry.cfg) or {}), **(member if isinstance(member, dict) else {})}
    members = _members(entry, settings)
    if name in above or (entry is None and members is None):
        return False
    return all(_complete(inner, index, above | {name}) for inner in members or ())


def _members(entry: Any, settings: Mapping[str, Any]) -> list[Any] | None:
    """Of a group or a tag; None for a task."""
    if entry is not None and entry.kind.name == "TAG":
        return sorted(entry.tags)
    return settings["task"] if isinstance(settings.get("task"), list) else None


def _name(member: str | Mapping[str, Any]) -> str:
    return member if isinstance(member, str) else str(member.get("group") or member.get("task"))


@functools.cache
def _packaged() -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """lm-eval and datasets draw bars and log on import and on use: ours are drawn elsewhere."""
    import datasets

    datasets.disable_progress_bars()
    previous = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with Path("/dev/null").open("w") as sink, contextlib.redirect_stderr(sink):
            yield
    finally:
        logging.disable(previous)
