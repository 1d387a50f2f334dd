"""lm-eval tasks over local rows, to be read without a network."""

import json
from pathlib import Path
from typing import Any

import yaml

Row = dict[str, Any]

ROLLING = {
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{text}}",
    "metric_list": [{"metric": "word_perplexity"}],
}
CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{answer}}",
    "metric_list": [{"metric": "acc"}],
}
GENERATE = {
    "output_type": "generate_until",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{answer}}",
    "metric_list": [{"metric": "exact_match"}],
}


def write_task(folder: Path, name: str, splits: dict[str, list[Row]], **settings: Any) -> str:
    """A task file with its rows beside it; `splits` by lm-eval's names: training, test, ..."""
    files = {}
    for split, rows in splits.items():
        files[split] = folder / f"{name}-{split}.jsonl"
        files[split].write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {split: str(path) for split, path in files.items()},
            "cache_dir": str(folder / "cache"),
        },
        **{f"{split}_split": split for split in splits},
        **(settings or ROLLING),
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))
    return name


def texts(*rows: str) -> list[Row]:
    return [{"text": row} for row in rows]
