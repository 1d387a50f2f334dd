"""A model of many small blocks in a folder, and jobs over it: long enough to be disturbed."""

import shutil
from pathlib import Path

import yaml

from tests.command import quantfleet

_BLOCKS = 16


def make_site(site: Path, model: Path, text: Path) -> Path:
    """A folder with a deeper model, and `whole`: the store of a job in one process."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shutil.copytree(model, site / "model")
    config = AutoConfig.from_pretrained(site / "model", num_hidden_layers=_BLOCKS)
    AutoModelForCausalLM.from_config(config).save_pretrained(site / "model")
    shutil.copyfile(text, site / "text.txt")
    assert quantfleet("run", "--in-process", write_job(site, "whole", 1)).code == 0
    return site


def write_job(site: Path, store: str, workers: int, kind: str = "auto") -> Path:
    job = {
        "name": "job",
        "model": {"path": "model"},
        "quantization": {"scheme": "int4", "group_size": 32, "method": "gptq"},
        "calibration": {"text": "text.txt", "sequences": 16, "length": 64},
        "workers": {"count": workers, "kind": kind},
        "output": {"store": store},
    }
    path = site / f"{store}.yaml"
    path.write_text(yaml.safe_dump(job))
    return path


def model_bytes(site: Path, store: str) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in (site / store / "job" / "model").iterdir()}


def records(site: Path, store: str) -> int:
    """Blocks that are published."""
    return len(list((site / store / "job" / "ledger").glob("block-*.json")))
