"""A job whose workers are killed and whose store is reached through a bad network."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from orchestrator.checks import check
from orchestrator.driver import run_job
from orchestrator.executors import InProcessExecutor
from orchestrator.fetch import fetch
from orchestrator.loop import Observer
from tests.faults import KillingExecutor, schedule
from tests.proxy import Proxy
from workers.store import open_store


def check_job_behind(
    proxy: Proxy,
    bucket: str,
    job_file: Callable[..., Path],
    tmp_path: Path,
    seed: int,
    **sections: Any,
) -> None:
    """Its artifact is, but for the report, that of an undisturbed job on a folder.

    `sections` are the disturbed job's alone.
    """
    whole = run_job(
        check(job_file("whole")), lambda plan: InProcessExecutor(plan, ["cpu"]), Observer()
    )
    prepared = check(job_file("job", output={"store": f"{bucket}/store"}, **sections))
    proxy.trouble(0.3, seed=seed)
    result = run_job(prepared, lambda plan: KillingExecutor(plan, 2, schedule(seed, 3)), Observer())
    assert sum(proxy.met.values()) > 5
    proxy.trouble(0.0, seed=0)
    fetch(open_store(result.store), tmp_path / "out")
    fetch(open_store(whole.store), tmp_path / "expected")
    for folder in ("out", "expected"):
        shutil.rmtree(tmp_path / folder / "report")
        manifest = json.loads((tmp_path / folder / "manifest.json").read_text())
        del manifest["job"]
        files = manifest["files"]
        manifest["files"] = {n: files[n] for n in files if not n.startswith("report/")}
        (tmp_path / folder / "manifest.json").write_text(json.dumps(manifest))
    out, expected = (
        {p.name: p.read_bytes() for p in (tmp_path / folder).iterdir()}
        for folder in ("out", "expected")
    )
    assert out == expected
