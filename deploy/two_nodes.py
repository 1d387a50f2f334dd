#!/usr/bin/env python3
"""Ray nodes on one machine, on its loopback alone: a cluster to try things on, without docker.

    python deploy/two_nodes.py start [--nodes 2] [--cpus 1] [--folder DIR] [--json]
    python deploy/two_nodes.py kill N [--folder DIR]
    python deploy/two_nodes.py stop [--folder DIR]

`start` starts a head that takes no work, with a dashboard for `quantfleet submit`, and worker
nodes. Each is a `ray start --block`; DIR/nodes.json has the processes of each, by id and start
time. `kill` ends worker node N at once, as a machine that is lost; `stop` ends all of them. Both
end these processes and their children and nothing else; `ray stop` would end every Ray here.

Exit codes: 0 done, 2 wrong usage, 4 a node did not start or did not end.
Uses psutil and the `ray` command beside the Python that runs it.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import psutil

BIN = Path(sys.executable).parent
LOOPBACK = "127.0.0.1"
START_S = 120.0  # far beyond what a node takes to start
STOP_S = 10.0  # for nodes to end by themselves
GONE_S = 10.0  # for killed processes to vanish

# A lost node is noticed in about five seconds; by default it takes half a minute.
HEALTH_CHECK = {
    "health_check_initial_delay_ms": 2000,
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 3000,
    "health_check_failure_threshold": 3,
}
OBJECT_STORE_BYTES = 200 * 2**20  # per node; what does not fit is spilled to disk

# Despite its name it counts on Linux too. With 0, a node's servers bind to 127.0.0.1, and that
# address is not replaced by the machine's outer one; but `ray start --address` refuses to run.
ON_LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
# Ray sends its token only where it is told to; the job API needs this, drivers need both.
FOR_DRIVERS = {"RAY_AUTH_MODE": "token", ON_LOOPBACK: "0"}


class RefusedError(Exception):
    """What the user is told, and the exit code that goes with it."""

    def __init__(self, message: str, code: int = 4) -> None:
        super().__init__(message)
        self.code = code


def main() -> int:
    arguments = _parse()
    folder = arguments.folder.absolute()
    try:
        if arguments.command == "start":
            _tell(start(folder, arguments.nodes, arguments.cpus), arguments.json)
        elif arguments.command == "kill":
            kill(folder, arguments.node)
        else:
            stop(folder)
    except RefusedError as refused:
        print(f"two_nodes: {refused}", file=sys.stderr)
        return refused.code
    except KeyboardInterrupt:
        return 130
    return 0


def start(folder: Path, nodes: int, cpus: int) -> dict[str, Any]:
    """A running cluster, as it stands in nodes.json; nothing runs if this raises."""
    if _alive(_processes(_read(folder))):
        raise RefusedError(f"{folder} has nodes that run: stop them first", code=2)
    folder.mkdir(parents=True, exist_ok=True)
    # the paths of Ray's sockets must be short: not in the folder, nor in a long TMPDIR
    scratch = tempfile.mkdtemp(prefix="quantfleet-", dir="/tmp")
    dashboard = f"http://{LOOPBACK}:{_free_port()}"
    cluster: dict[str, Any] = {
        "folder": str(folder),
        "scratch": scratch,
        "dashboard": dashboard,
        "nodes": [],
    }
    with _interruptible(), _ended_if_failed(folder, cluster):
        _ensure_token()
        head = _launch(folder, cluster, "head", _head(cluster), {ON_LOOPBACK: "0"})
        _await_start(head, folder / "head.log")
        cluster["address"] = _address(Path(scratch) / "head")
        for number in range(1, nodes + 1):
            name = f"node-{number}"
            worker = _launch(folder, cluster, name, _worker(cluster, name, cpus))
            _await_start(worker, folder / f"{name}.log")
        for node in cluster["nodes"]:  # a node's first process may die and leave others
            node["processes"] = [_record(process) for process in _with_children(node["processes"])]
        _write(folder, cluster)
    return cluster


def kill(folder: Path, number: int) -> None:
    """End worker node `number` at once: no process of it is asked first."""
    names = {node["name"]: node for node in _read(folder)["nodes"]}
    node = names.get(f"node-{number}")
    if node is None:
        raise RefusedError(f"{folder} has no worker node {number}", code=2)
    processes = _alive(_with_children(node["processes"]))
    if not processes:
        raise RefusedError(f"worker node {number} runs no more", code=2)
    _kill(processes)


def stop(folder: Path) -> None:
    """End all nodes, and wait until they are gone."""
    cluster = _read(folder)
    if not (folder / "nodes.json").is_file():
        raise RefusedError(
            f"there is no {folder / 'nodes.json'}: nothing was started there", code=2
        )
    _end(folder, cluster)


def _head(cluster: dict[str, Any]) -> list[str]:
    return [
        "--head",
        "--port=0",
        "--num-cpus=0",  # drivers run here, workers do not
        "--include-dashboard=true",
        f"--dashboard-host={LOOPBACK}",
        f"--dashboard-port={cluster['dashboard'].rpartition(':')[2]}",
        f"--ray-client-server-port={_free_port()}",  # it cannot be left out, nor be 0
        f"--system-config={json.dumps(HEALTH_CHECK)}",
        "--disable-usage-stats",
    ]


def _worker(cluster: dict[str, Any], name: str, cpus: int) -> list[str]:
    """To join a head on the loopback.

    Ray replaces 127.0.0.1 in an address by the machine's outer one. 0.0.0.0 it leaves alone, and
    the kernel takes that to the loopback; so does Ray when it asks itself for the node's address.
    """
    port = cluster["address"].rpartition(":")[2]
    return [f"--address=0.0.0.0:{port}", f"--node-name={name}", f"--num-cpus={cpus}"]


def _launch(
    folder: Path,
    cluster: dict[str, Any],
    name: str,
    arguments: list[str],
    more: dict[str, str] | None = None,
) -> subprocess.Popen[bytes]:
    command = [
        str(BIN / "ray"),
        "start",
        *arguments,
        "--block",
        # as on machines of their own: in a shared one, nodes replace each other's packages
        f"--temp-dir={cluster['scratch']}/{name}",
        "--num-gpus=0",  # each node would count the machine's
        f"--object-store-memory={OBJECT_STORE_BYTES}",
        # 0: any free one; the defaults are the same for every node
        "--min-worker-port=0",
        "--max-worker-port=0",
        "--dashboard-agent-listen-port=0",
    ]
    with (folder / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(
            command,
            env=_environment() | (more or {}),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a terminal's interrupt ends what is in front, not the nodes
        )
    record = _record(psutil.Process(process.pid))
    cluster["nodes"].append({"name": name, "processes": [record]})
    _write(folder, cluster)
    return process


def _environment() -> dict[str, str]:
    dropped = {ON_LOOPBACK, "RAY_ADDRESS"}
    environment = {key: value for key, value in os.environ.items() if key not in dropped}
    environment["PATH"] = f"{BIN}{os.pathsep}{environment.get('PATH', '')}"  # a job's `python`
    environment["RAY_AUTH_MODE"] = "token"
    # nodes that are told to end would let their work go on for half a minute
    environment["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] = "0"
    return environment


def _ensure_token() -> None:
    """Nodes and drivers of one user share a token: the environment's, or the home folder's."""
    given = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    if given or (Path.home() / ".ray" / "auth_token").is_file():
        return
    make = [str(BIN / "ray"), "get-auth-token", "--generate"]
    if subprocess.run(make, capture_output=True, check=False).returncode != 0:
        raise RefusedError("`ray get-auth-token --generate` failed: Ray needs a token")


def _await_start(process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + START_S
    while "Ray runtime started" not in log.read_text(errors="replace"):
        if process.poll() is not None or time.monotonic() > end:
            lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
            last = lines[-1].strip() if lines else "it said nothing"
            raise RefusedError(f"{log.stem} did not start: {last} (see {log})")
        time.sleep(0.1)


def _address(temporary: Path) -> str:
    """Where the head's GCS listens, as Ray notes it down."""
    note = temporary / "ray_current_cluster"
    end = time.monotonic() + GONE_S
    while not note.is_file() or not note.read_text().strip():
        if time.monotonic() > end:
            raise RefusedError(f"the head did not write its address to {note}")
        time.sleep(0.1)
    return note.read_text().strip()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """What ends this process while nodes start is an exception, and they are ended with it."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _ended_if_failed(folder: Path, cluster: dict[str, Any]) -> Iterator[None]:
    try:
        yield
    except BaseException:
        _end(folder, cluster)
        raise


def _end(folder: Path, cluster: dict[str, Any]) -> None:
    processes = _processes(cluster)
    for process in _known([node["processes"][0] for node in cluster["nodes"]]):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    _await_end(processes, STOP_S)
    # what came while they ended, and what did not heed
    _kill({*processes, *_processes(cluster)})
    shutil.rmtree(cluster.get("scratch", ""), ignore_errors=True)
    (folder / "nodes.json").unlink(missing_ok=True)


def _kill(processes: Iterable[psutil.Process]) -> None:
    processes = list(processes)
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()  # psutil compares start times first: never a process that came later
    if left := _await_end(processes, GONE_S):
        raise RefusedError(f"processes that do not end: {', '.join(str(p.pid) for p in left)}")


def _await_end(processes: Iterable[psutil.Process], wait_s: float) -> list[psutil.Process]:
    """Those that are still there after the wait."""
    end = time.monotonic() + wait_s
    while (left := _alive(processes)) and time.monotonic() < end:
        time.sleep(0.1)
    return left


def _processes(cluster: dict[str, Any]) -> list[psutil.Process]:
    return [p for node in cluster["nodes"] for p in _with_children(node["processes"])]


def _with_children(records: list[list[float]]) -> list[psutil.Process]:
    found = {}
    for process in _known(records):
        found[process.pid] = process
        with contextlib.suppress(psutil.NoSuchProcess):
            found |= {child.pid: child for child in process.children(recursive=True)}
    return list(found.values())


def _known(records: list[list[float]]) -> list[psutil.Process]:
    """The processes of these records that are still the same ones: ids are used again."""
    known = []
    for pid, started in records:
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(int(pid))
            if abs(process.create_time() - started) < 1:  # as exact as the machine's clock is
                known.append(process)
    return known


def _alive(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    """Without zombies: in a container nobody may be there to bury them."""
    alive = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                alive.append(process)
    return alive


def _record(process: psutil.Process) -> list[float]:
    return [process.pid, process.create_time()]


def _read(folder: Path) -> dict[str, Any]:
    path = folder / "nodes.json"
    if not path.is_file():
        return {"nodes": []}
    cluster: dict[str, Any] = json.loads(path.read_text())
    return cluster


def _write(folder: Path, cluster: dict[str, Any]) -> None:
    partial = folder / "nodes.json.partial"
    partial.write_text(json.dumps(cluster, indent=1))
    partial.replace(folder / "nodes.json")


def _tell(cluster: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps({**cluster, "environment": FOR_DRIVERS}, indent=1))
        return
    settings = " ".join(f"{key}={value}" for key, value in FOR_DRIVERS.items())
    print(f"cluster    {cluster['address']}, {len(cluster['nodes']) - 1} worker nodes")
    print(f"dashboard  {cluster['dashboard']}")
    print(f"settings   export {settings}")
    print(f"submit     quantfleet submit JOB.YAML --address {cluster['dashboard']}")
    print(f"stop       python {sys.argv[0]} stop --folder {cluster['folder']}")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Ray nodes on this machine's loopback.")
    commands = parser.add_subparsers(dest="command", required=True)
    parsers = {name: commands.add_parser(name) for name in ("start", "kill", "stop")}
    for command in parsers.values():
        command.add_argument("--folder", type=Path, default=Path("ray-nodes"))
    parsers["start"].add_argument("--nodes", type=_positive, default=2, help="worker nodes")
    parsers["start"].add_argument("--cpus", type=_positive, default=1, help="of each worker node")
    parsers["start"].add_argument("--json", action="store_true")
    parsers["kill"].add_argument("node", type=int, metavar="N", help="a worker node: 1, 2, ...")
    return parser.parse_args()


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return number


if __name__ == "__main__":
    sys.exit(main())
