"""Calibration sequences from lm-eval tasks: their documents, in the words of their requests.

A document is what a model would be handed for it: the request's context and continuation, or the
text itself where a task scores whole texts. Of the requests of a multiple-choice document the one
with the right answer is taken; where the task does not say which that is, and where a document has
several requests for other reasons, the first. Few-shot examples are part of the context, as the
task file has them. No chat template, and no special tokens.

Documents come from a split that lm-eval does not measure by, if a task has one: calibration would
else see what the evaluation asks.
"""

import contextlib
import itertools
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jobs.spec import CalibrationSpec, EvaluationSpec
from quantcore.errors import SourceError, SpecError
from workers.calibration import encode, fill
from workers.harness import quiet, settings_of, task_manager

SPLITS = ("training", "validation", "test")


@dataclass(frozen=True, slots=True)
class Windows:
    """Token ids, int64 (sequences, length), PADDING after a short one's end; whence they come."""

    ids_SL: Tensor
    sources: dict[str, int] = field(default_factory=dict)  # sequences by task and split
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Pool:
    """The documents of one task that may be taken."""

    task: Any
    name: str
    split: str
    documents: Sequence[Any]


def task_windows(spec: CalibrationSpec, tokenizer: Any) -> Windows:
    """Token ids of the documents of `spec.tasks`.

    The first `limit` documents of each task are put in an order that the seed decides, and the
    tasks are asked for one in turn until there are `sequences` of them. One longer than `length`
    is cut off there. A shorter one is padded, dropped, or joined with those after it, two line
    breaks between them, by `short`. Documents without a token count as not there.

    Raises SpecError for a task that is unknown, lacks documents or is not of texts alone, and for
    too few of them; SourceError for what lm-eval cannot load.
    """
    taken: list[str] = []  # from where, document by document

    def documents() -> Iterator[list[int]]:
        for pool, text in _in_turn(pools, spec):
            if ids := encode(tokenizer, text):
                taken.append(f"{pool.name} ({pool.split})")
                yield ids

    with quiet(), _seeded(spec.seed):
        pools = [_pool(name, task, spec) for name, task in _load(spec).items()]
        rows, used = fill(documents(), spec, encode(tokenizer, "\n\n"))
    if len(rows) < spec.sequences:
        raise SpecError(_too_few(spec, len(taken), len(rows)))
    sources = Counter(taken[number] for number in used)
    return Windows(torch.tensor(rows), dict(sorted(sources.items())))


def measured_tasks(
    calibration: CalibrationSpec, evaluation: EvaluationSpec | None
) -> list[tuple[str, str]]:
    """The calibration's tasks, each with its split, whose documents the evaluation measures by."""
    if evaluation is None or not evaluation.tasks:
        return []
    measured = {
        _place(name, settings, _measured(settings))
        for name, settings in settings_of(evaluation.tasks, evaluation.task_folder)
    }
    used = [
        (name, settings, calibration.split or _unmeasured(settings))
        for name, settings in settings_of(calibration.tasks, calibration.task_folder)
    ]
    return [(n, split) for n, settings, split in used if _place(n, settings, split) in measured]


def _measured(settings: Mapping[str, Any]) -> str:
    return "test" if settings.get("test_split") else "validation"


def _unmeasured(settings: Mapping[str, Any]) -> str:
    """The first split that lm-eval does not measure by; else the one that it does."""
    if settings.get("training_split"):
        return "training"
    return "validation" if settings.get("validation_split") else "test"


def _place(name: str, settings: Mapping[str, Any], split: str) -> tuple[str, ...]:
    """What tells a split's documents from others; a task that is a class tells its name alone."""
    path, part = settings.get("dataset_path"), settings.get(f"{split}_split")
    if path is None:
        return (name,)
    options = settings.get("dataset_kwargs") or {}
    part = str(part).partition("[")[0]  # train[:100] is of train
    files = options.get("data_files")
    if isinstance(files, Mapping) and part in files:
        return (str(path), str(files[part]))
    inside = (settings.get("dataset_name"), options.get("data_dir"), files, part)
    return (str(path), *map(str, inside))


def _load(spec: CalibrationSpec) -> dict[str, Any]:
    """The tasks by name, groups spread out, with their data."""
    manager = task_manager(spec.tasks, spec.task_folder)
    tasks: dict[str, Any] = {}
    for name in spec.tasks:
        if name not in manager.all_tasks:
            raise SpecError(
                f"calibration.tasks: lm-eval knows no task '{name}': see lm-eval ls tasks, "
                "or set task_folder"
            )
        try:
            tasks |= manager.load([name])["tasks"]
        except Exception as error:  # task files hold code, and data comes over networks
            first = (str(error) or repr(error)).splitlines()[0]
            raise SourceError(
                f"calibration.tasks: lm-eval cannot load '{name}': {type(error).__name__}: {first}"
            ) from None
    return tasks


def _pool(name: str, task: Any, spec: CalibrationSpec) -> _Pool:
    if getattr(task, "MULTIMODAL", False):
        raise SpecError(f"calibration.tasks: '{name}' asks about images or sound: name another")
    has = {split: getattr(task, f"has_{split}_docs")() for split in SPLITS}
    split = spec.split or _unmeasured({f"{split}_split": there for split, there in has.items()})
    if not has[split]:
        others = " or ".join(split for split, there in has.items() if there)
        raise SpecError(f"calibration.split: '{name}' has no {split} split: write {others}")
    documents = getattr(task, f"{split}_docs")()
    if not hasattr(documents, "__getitem__"):
        documents = list(documents)
    if not documents:
        raise SpecError(f"calibration.tasks: '{name}' has no documents in its {split} split")
    if task.get_config("num_fewshot") is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=spec.seed)
    return _Pool(task, name, split, documents)


def _in_turn(pools: list[_Pool], spec: CalibrationSpec) -> Iterator[tuple[_Pool, str]]:
    shuffle = random.Random(spec.seed)  # noqa: S311
    orders = []
    for pool in pools:
        count = min(len(pool.documents), spec.limit or len(pool.documents))
        orders.append([(pool, number) for number in shuffle.sample(range(count), count)])
    for turn in itertools.zip_longest(*orders):
        for pool, number in filter(None, turn):
            yield pool, _text(pool, number)


def _text(pool: _Pool, number: int) -> str:
    """A document as a model is handed it."""
    task, document = pool.task, pool.documents[number]
    options = {"apply_chat_template": False, "chat_template": None}
    try:
        context = task.fewshot_context(
            document,
            num_fewshot=task.get_config("num_fewshot"),
            system_instruction=None,
            fewshot_as_multiturn=False,
            gen_prefix=task.doc_to_prefix(document),
            **options,
        )
        repeats = task.get_config("repeats")
        requests = task.construct_requests(
            doc=document, ctx=context, metadata=(pool.name, number, repeats), **options
        )
        requests = requests if isinstance(requests, list) else [requests]
        request = requests[_right(task, document) if len(requests) > 1 else 0]
    except Exception as error:  # of a task's own templates and functions
        raise SourceError(
            f"calibration.tasks: lm-eval cannot ask document {number} of '{pool.name}' "
            f"({pool.split}): {type(error).__name__}: {error}"
        ) from None
    return "".join(part for part in request.args if isinstance(part, str))


def _right(task: Any, document: Any) -> int:
    """Which of a multiple-choice document's requests has the right answer; 0 if nothing tells."""
    if task.get_config("output_type") != "multiple_choice":
        return 0
    choices = task.doc_to_choice(document)
    asked = task.doc_to_text if task.multiple_input else task.doc_to_target
    right = asked(document)
    if isinstance(right, list):  # several are right
        right = right[0] if right else 0
    if isinstance(right, str):
        right = choices.index(right) if right in choices else 0
    return right if isinstance(right, int) and 0 <= right < len(choices) else 0


def _too_few(spec: CalibrationSpec, documents: int, found: int) -> str:
    names = ", ".join(spec.tasks) + (f" (limit: {spec.limit})" if spec.limit else "")
    fits = f"write sequences: {found}, " if found else ""
    match spec.short:
        case "drop":
            there = f"of {documents} documents of {names} {found} are that long"
            instead = "a shorter length, or short: pad"
        case "join":
            there = f"{documents} documents of {names} make {found} when joined"
            instead = "a shorter length, or more tasks"
        case _:
            there = f"there are {documents} documents of {names}"
            instead = "or more tasks"
    return (
        f"calibration.sequences: {spec.sequences} sequences of {spec.length} tokens are wanted, "
        f"and {there}: {fits}{instead}"
    )


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Tasks that shuffle, as some do with answers, shuffle alike every time."""
    states = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
