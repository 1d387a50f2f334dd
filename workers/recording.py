"""Statistics of any causal language model's linears, from the documents of lm-eval tasks.

Shape suffixes: B = sequences, S = all of them, L = tokens each.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn

from jobs.spec import CalibrationSpec
from quantcore.errors import SpecError
from quantcore.recorder import Recorder
from workers.documents import task_windows
from workers.plan import PADDING


def calibrate(  # noqa: PLR0913 - keys of a job's calibration section
    model: nn.Module,
    tokenizer: Any,
    *,
    tasks: Sequence[str],
    task_folder: Path | None = None,
    limit: int | None = None,
    split: str | None = None,
    sequences: int = 128,
    length: int = 512,
    short: str = "pad",
    seed: int = 0,
    batch: int = 8,
    recorder: Recorder | None = None,
) -> Recorder:
    """Run a model on documents of lm-eval tasks; what its linears were handed.

    All but `batch` (sequences per forward) and `recorder` mean what they do in a job file, and
    choose the same token ids. `model(ids)` takes int64 (B, L) and must look back alone: padding
    stands after a sequence's tokens, and is left out of all statistics. A `recorder` of the model
    may be given, to watch other modules or to add to what it has; by default all of nn.Linear.

    Raises SpecError for a value that is none and for tasks that are unknown or too few, and
    SourceError for what lm-eval cannot load.
    """
    options = {"limit": limit, "split": split, "sequences": sequences, "length": length}
    more = {"task_folder": task_folder, "short": short, "seed": seed}
    try:
        spec = CalibrationSpec.model_validate({"tasks": tuple(tasks), **options, **more})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "tasks"
        raise SpecError(f"{where}: {first['msg'].removeprefix('Value error, ')}") from None
    recorder = Recorder(model) if recorder is None else recorder
    ids_SL = task_windows(spec, tokenizer).ids_SL.to(next(model.parameters()).device)
    with recorder, torch.no_grad():
        for ids_BL in torch.split(ids_SL, batch):
            with recorder.only(ids_BL != PADDING):
                model(ids_BL.clamp(min=0))
    return recorder
