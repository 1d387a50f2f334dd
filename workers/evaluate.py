"""Measure a model with lm-eval: perplexity on a local text, and any of its tasks by name."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from jobs.spec import EvaluationSpec
from quantcore.errors import SourceError, SpecError
from workers.harness import quiet, task_manager

TEXT_TASK = "text"  # the name of the local text's row in every report

_TEXT_TASK_FILE = """
task: {task}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}, cache_dir: {cache}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - metric: word_perplexity
  - metric: byte_perplexity
"""


Tell = Callable[[int, int], None]  # how many of how many forwards are done


def evaluate(
    model: Any,
    tokenizer: Any,
    spec: EvaluationSpec,
    text: str | None,
    tell: Tell = lambda done, total: None,
) -> dict[str, dict[str, float]]:
    """Metrics by task; `text` is what `read_text` made of the spec's."""
    from lm_eval import evaluator

    # it would ask git, which complains where there is no repository
    evaluator.get_git_commit_hash = lambda: None
    device = next(model.parameters()).device
    with tempfile.TemporaryDirectory(prefix="quantfleet-") as scratch, quiet(), torch.no_grad():
        tasks = list(spec.tasks)
        if text is not None:
            tasks.insert(0, _write_text_task(Path(scratch), text))
        wrapped = _watched_model(tell)(
            pretrained=model,
            tokenizer=tokenizer,
            backend="causal",
            batch_size=1,
            max_length=spec.length,
            device=str(device),
        )
        results = evaluator.simple_evaluate(
            model=wrapped,
            tasks=tasks,
            task_manager=task_manager(tasks, Path(scratch), spec.task_folder),
            limit=spec.limit,
            bootstrap_iters=0,
        )
    return {name: _numbers(metrics) for name, metrics in results["results"].items()}


def _watched_model(tell: Tell) -> Any:
    """lm-eval's model, made to say how far it is: lm-eval itself only draws bars."""
    from lm_eval.models.huggingface import HFLM

    class Watched(HFLM):  # type: ignore[misc]
        done = total = 0

        def loglikelihood(self, requests: Any, **options: Any) -> Any:
            self.total += len(requests)
            return super().loglikelihood(requests, **options)

        def loglikelihood_rolling(self, requests: Any, **options: Any) -> Any:
            tokens = (len(self.tok_encode(request.args[0])) for request in requests)
            self.total += sum(-(-count // self.max_length) for count in tokens)
            return super().loglikelihood_rolling(requests, **options)

        def _model_call(self, *args: Any, **options: Any) -> Any:
            logits = super()._model_call(*args, **options)
            self.done += 1
            tell(min(self.done, self.total), self.total)
            return logits

    return Watched


def read_text(spec: EvaluationSpec) -> str | None:
    """The part of the local text that is measured. Raises SourceError or SpecError."""
    if spec.text is None:
        return None
    try:
        text = spec.text.read_text(encoding="utf-8")[: spec.max_characters]
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"cannot read evaluation.text: {error}") from None
    if not text.strip():
        raise SpecError(f"evaluation.text: {spec.text} is empty: name a text")
    return text


def _write_text_task(folder: Path, text: str) -> str:
    rows = folder / "rows.jsonl"
    rows.write_text(json.dumps({"text": text}) + "\n")
    filled = _TEXT_TASK_FILE.format(task=TEXT_TASK, rows=rows, cache=folder / "cache")
    (folder / f"{TEXT_TASK}.yaml").write_text(filled)
    return TEXT_TASK


def _numbers(metrics: dict[str, Any]) -> dict[str, float]:
    """lm-eval's 'metric,filter' keys with their numbers; no standard errors were asked for."""
    return {
        key.removesuffix(",none"): value
        for key, value in metrics.items()
        if isinstance(value, int | float) and "stderr" not in key and key != "sample_len"
    }
