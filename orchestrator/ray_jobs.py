"""Jobs on a cluster that is reached over the network alone, through Ray's job API.

The driver runs on the cluster: the laptop that submits may leave. What travels is the job file
and the texts it names; the model and a local store must be where the cluster's nodes see them.
"""

import asyncio
import contextlib
import logging
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from jobs.load import read_document, resolve_paths, validate
from jobs.spec import JobSpec
from orchestrator.printing import INTERRUPTED
from orchestrator.ray_cluster import first_line, job_client, unreached
from quantcore.errors import JobFaults, ResourceError, SpecError

_STOP_WAIT_S = 60  # for a driver to leave its lease and say what is kept
_JOB_FILE = "job.yaml"
_PLAN_FILE = "plan.json"
_CHATTY = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)
_TEXTS = (
    ("calibration", "text"),
    ("calibration", "jsonl"),
    ("calibration", "task_folder"),  # which the driver alone reads
    ("evaluation", "text"),
)
_MOST_PACKED_BYTES = 90 * 2**20  # Ray refuses packages over 100 MiB


class RemoteJobs:
    """`address` is a Ray dashboard's: http://HOST:8265. Raises ResourceError if none is there."""

    def __init__(self, address: str) -> None:
        if "://" not in address:
            raise SpecError(f"--address: {address}: write the dashboard's, as http://HOST:8265")
        try:
            self._client = job_client(address)
        except Exception as error:
            raise unreached(address, error) from None
        for chatty in _CHATTY:  # each was given a level of its own when it was imported
            logging.getLogger(chatty).setLevel(logging.ERROR)

    def submit(self, job: Path, wheel: Path | None = None) -> dict[str, str]:
        """Send a job; its id and where its artifact will be. Raises JobFaults for a bad file."""
        document = read_document(job)
        spec, faults = validate(document)
        if faults or spec is None:
            raise JobFaults(str(job), faults)
        spec = resolve_paths(spec, job.absolute().parent)
        identifier = f"{spec.name}-{secrets.token_hex(4)}"
        store = f"{spec.output.store.rstrip('/')}/{spec.name}"
        with _packed(spec) as folder:
            runtime: dict[str, Any] = {
                "working_dir": str(folder),
                "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(_STOP_WAIT_S)},
            }
            if wheel is not None:
                runtime["py_modules"] = [str(wheel.absolute())]
            with _told(identifier):
                self._client.submit_job(
                    entrypoint=f"python -m orchestrator run {_JOB_FILE}",
                    submission_id=identifier,
                    runtime_env=runtime,
                    metadata={"quantfleet.job": spec.name, "quantfleet.store": store},
                )
        return {"id": identifier, "store": store}

    def status(self, identifier: str) -> dict[str, Any]:
        with _told(identifier):
            return _facts(self._client.get_job_info(identifier))

    def jobs(self) -> list[dict[str, Any]]:
        """The cluster's jobs that were submitted by quantfleet, the newest first."""
        with _told("jobs"):
            details = self._client.list_jobs()
        ours = [d for d in details if (d.metadata or {}).get("quantfleet.job")]
        return [_facts(d) for d in sorted(ours, key=lambda d: -(d.start_time or 0))]

    def cancel(self, identifier: str) -> bool:
        """Ask a job to end; False if it had ended already."""
        with _told(identifier):
            return bool(self._client.stop_job(identifier))

    def logs(self, identifier: str) -> str:
        with _told(identifier):
            return str(self._client.get_job_logs(identifier))

    def follow(self, identifier: str) -> Iterator[str]:
        """The log from its beginning, as it grows, until the job ends."""
        stream = self._client.tail_job_logs(identifier)
        loop = asyncio.new_event_loop()
        try:
            while True:
                with _told(identifier):
                    try:
                        lines = loop.run_until_complete(anext(stream))
                    except StopAsyncIteration:
                        return
                yield lines
        finally:
            loop.run_until_complete(stream.aclose())
            loop.close()


@contextlib.contextmanager
def _packed(spec: JobSpec) -> Iterator[Path]:
    """A folder with the job file and the texts that are here, to be sent along."""
    data = spec.model_dump(mode="json", exclude_none=True)
    with tempfile.TemporaryDirectory(prefix="quantfleet-") as scratch:
        folder = Path(scratch)
        size = 0
        for section, name in _TEXTS:
            path = getattr(getattr(spec, section), name, None)
            folder_meant = name == "task_folder"
            if path is None or not (path.is_dir() if folder_meant else path.is_file()):
                continue
            files = path.rglob("*") if folder_meant else [path]
            size += sum(file.stat().st_size for file in files)
            if size > _MOST_PACKED_BYTES:
                raise SpecError(
                    f"{section}.{name}: the texts are over {_MOST_PACKED_BYTES >> 20} MiB, too "
                    "much to send along: put them where the cluster's nodes see them"
                )
            packed = f"{section}-{name}{path.suffix}"
            if folder_meant:
                shutil.copytree(path, folder / packed)
            else:
                shutil.copyfile(path, folder / packed)
            data[section][name] = packed
        plan = spec.quantization.plan
        if plan is not None and plan.path is not None and Path(plan.path).is_file():
            shutil.copyfile(plan.path, folder / _PLAN_FILE)
            data["quantization"]["plan"]["path"] = _PLAN_FILE
        (folder / _JOB_FILE).write_text(yaml.safe_dump(data, sort_keys=False))
        yield folder


def _facts(details: Any) -> dict[str, Any]:
    metadata = details.metadata or {}
    return {
        "id": details.submission_id,
        "job": metadata.get("quantfleet.job", ""),
        "store": metadata.get("quantfleet.store", ""),
        "status": str(getattr(details.status, "value", details.status)),
        "message": details.message or "",
        "exit_code": _exit_code(details),
    }


def _exit_code(details: Any) -> int | None:
    """The driver's own; None while it runs. Ray knows none where it ended a driver itself."""
    match str(getattr(details.status, "value", details.status)):
        case "SUCCEEDED":
            return 0
        case "STOPPED":
            return INTERRUPTED
        case "FAILED":
            return details.driver_exit_code or ResourceError.exit_code
        case _:
            return None


@contextlib.contextmanager
def _told(identifier: str) -> Iterator[None]:
    """Ray's client raises RuntimeError with the server's traceback for whatever went wrong."""
    try:
        yield
    except (RuntimeError, OSError) as error:
        if "does not exist" in str(error):
            message = f"the cluster knows no job '{identifier}': see quantfleet list --address"
            raise SpecError(message) from None
        raise ResourceError(f"{identifier}: {first_line(error)}") from None
