"""Jobs whose results do not fit in Ray's object store, which is as small here as Ray lets it be."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.command import finish, quantfleet, start

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

_STORE_BYTES = 78 * 2**20
# of each worker: 49 MB of Hessians for a block, most of it for the widest linear
_WIDE = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 8}
# what Ray is told of the disk: full, since more than a thousandth of it is taken
_FULL = {"local_fs_capacity_threshold": 0.001, "local_fs_monitor_interval_ms": 100}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, model_folder: Any, text_file: Path) -> Path:
    """A folder with a wide model, and `whole`: the store of a job in one process."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    site = tmp_path_factory.mktemp("wide")
    shutil.copytree(model_folder("llama"), site / "model")
    config = AutoConfig.from_pretrained(site / "model", **_WIDE)
    config.head_dim = _WIDE["hidden_size"] // _WIDE["num_attention_heads"]
    torch.manual_seed(7)
    AutoModelForCausalLM.from_config(config).save_pretrained(site / "model")
    shutil.copyfile(text_file, site / "text.txt")
    assert quantfleet("run", "--in-process", _job(site, "whole")).code == 0
    return site


def _job(site: Path, store: str) -> Path:
    """The first block's sums are small: only its attention is quantized."""
    overrides = [{"match": "model.layers.0.mlp.*", "skip": True}]
    quantization = {"scheme": "int4", "group_size": 32, "method": "gptq", "overrides": overrides}
    job = {
        "name": "job",
        "model": {"path": "model"},
        "quantization": quantization,
        "calibration": {"text": "text.txt", "sequences": 16, "length": 64},
        "workers": {"count": 2},
        "output": {"store": store},
    }
    path = site / f"{store}.yaml"
    path.write_text(yaml.safe_dump(job))
    return path


@contextmanager
def _cluster(**config: Any) -> Iterator[Any]:
    """A head that takes no work and a node for two workers; `config` is Ray's."""
    from ray.cluster_utils import Cluster

    args = {"num_cpus": 0, "_system_config": config, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=args)
    try:
        cluster.add_node(num_cpus=2, object_store_memory=_STORE_BYTES)
        yield cluster
    finally:
        cluster.shutdown()


def _spilled(cluster: Any) -> bool:
    (node,) = cluster.worker_nodes
    logs = Path(node.get_logs_dir_path()).glob("raylet*.out")
    return any(":info_message:Spilled " in log.read_text() for log in logs)


def _model_bytes(site: Path, store: str) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in (site / store / "job" / "model").iterdir()}


def test_results_that_do_not_fit_go_to_disk_and_change_no_bit(site: Path) -> None:
    with _cluster() as cluster:
        outcome = finish(start("run", "--address", cluster.address, _job(site, "spilled")))
        spilled = _spilled(cluster)
    assert outcome.code == 0, outcome
    assert spilled
    assert _model_bytes(site, "spilled") == _model_bytes(site, "whole")


def test_a_full_disk_ends_a_job_in_one_line_and_a_rerun_with_room_goes_on(site: Path) -> None:
    job, log = _job(site, "full"), site / "full.jsonl"
    with _cluster(**_FULL) as cluster:
        outcome = finish(start("run", "--address", cluster.address, job))
    assert outcome.code == 4, outcome
    *_, kept, error = outcome.err.splitlines()
    assert kept.startswith("1 of 3 blocks are kept; go on with: quantfleet resume ")
    assert error.startswith("error: a task's results found no room on node ")
    assert "Traceback" not in outcome.err
    with _cluster() as cluster:
        outcome = finish(start("run", "--address", cluster.address, "--log-file", log, job))
    assert outcome.code == 0, outcome
    events = [json.loads(line) for line in log.read_text().splitlines()]
    assert [e["done"] for e in events if e["event"] == "quantizing"] == [1]
    assert _model_bytes(site, "full") == _model_bytes(site, "whole")
