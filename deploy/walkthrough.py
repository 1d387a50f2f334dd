#!/usr/bin/env python3
"""A job on a cluster of this machine, one node of which is lost: what a user would type.

    python deploy/walkthrough.py --job JOB.YAML --folder DIR [--nodes 2] [--kill-after 2]

From the folder: start the nodes, submit the job, follow its log, kill worker node 1 once so many
blocks are done, see the job end, stop the cluster, fetch the artifact from the store. All by the
command line: quantfleet and two_nodes.py. Ends with 0 if the artifact is there, and otherwise
with the code of the command that failed; the cluster is stopped in any case.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

TOKEN = {"RAY_AUTH_MODE": "token"}  # Ray sends its token only where it is told to
NODES = str(Path(__file__).resolve().with_name("two_nodes.py"))
QUANTFLEET = str(Path(sys.executable).with_name("quantfleet"))


class CommandError(Exception):
    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def main() -> int:
    parser = argparse.ArgumentParser(description="A job on two nodes, one of which is lost.")
    parser.add_argument("--job", type=Path, required=True, help="a job file, its model here")
    parser.add_argument("--folder", type=Path, required=True, help="a new folder to work in")
    parser.add_argument("--nodes", type=int, default=2, help="worker nodes to start")
    parser.add_argument("--cpus", type=int, default=1, help="of each worker node")
    parser.add_argument("--kill-after", type=int, default=2, help="blocks that are done by then")
    arguments = parser.parse_args()
    job, folder = arguments.job.absolute(), arguments.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        size = ("--nodes", str(arguments.nodes), "--cpus", str(arguments.cpus))
        cluster = json.loads(_run(folder, sys.executable, NODES, "start", "--json", *size))
        try:
            store = _work(folder, job, cluster["dashboard"], arguments.kill_after)
        finally:
            _run(folder, sys.executable, NODES, "stop")
        _run(folder, QUANTFLEET, "fetch", store, "artifact")
    except CommandError as failed:
        _say(str(failed))
        return failed.code
    weights = list((folder / "artifact").glob("*.safetensors"))
    if not weights or not (folder / "artifact" / "config.json").is_file():
        _say(f"{folder / 'artifact'} is no model")
        return 1
    _say(f"{folder / 'artifact'}: {len(weights)} files of weights")
    return 0


def _work(folder: Path, job: Path, dashboard: str, kill_after: int) -> str:
    """Submit, follow and disturb the job; the place of its artifact once it has ended well."""
    address = ("--address", dashboard)
    sent = json.loads(_run(folder, QUANTFLEET, "submit", str(job), "--json", *address))
    follow = _start(folder, QUANTFLEET, "logs", "-f", sent["id"], *address, stdout=subprocess.PIPE)
    lines: list[str] = []
    reader = threading.Thread(target=_echo, args=(follow, lines))
    reader.start()
    try:
        while follow.poll() is None and _blocks_done(folder, sent["store"]) < kill_after:
            time.sleep(0.2)
        if follow.poll() is None:
            _run(folder, sys.executable, NODES, "kill", "1")
        if code := follow.wait():
            raise CommandError(f"the job failed (code {code})", code)
    finally:
        follow.kill()
        reader.join()
    if not any("is lost" in line for line in lines):
        raise CommandError("the job ended before a node was killed: take a longer one", 1)
    return str(sent["store"])


def _echo(process: subprocess.Popen[str], lines: list[str]) -> None:
    for line in process.stdout or ():
        print(line, end="", flush=True)
        lines.append(line)


def _blocks_done(folder: Path, store: str) -> int:
    """0 while the job is not begun: its store holds nothing yet, and status says so with 3."""
    status = subprocess.run(
        [QUANTFLEET, "status", store, "--json"],
        cwd=folder,
        env=os.environ | TOKEN,
        capture_output=True,
        text=True,
        check=False,
    )
    return int(json.loads(status.stdout)["blocks_done"]) if status.returncode == 0 else 0


def _run(folder: Path, *command: str) -> str:
    process = _start(folder, *command, stdout=subprocess.PIPE)
    out, _ = process.communicate()
    if process.returncode != 0:
        raise CommandError(f"{command[:3]} ended with {process.returncode}", process.returncode)
    return out


def _start(folder: Path, *command: str, stdout: int | None = None) -> subprocess.Popen[str]:
    shown = [Path(command[0]).name, *command[1:]]
    _say(" ".join(shown))
    environment = os.environ | TOKEN
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=stdout, text=True)


def _say(line: str) -> None:
    print(f"walkthrough: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
