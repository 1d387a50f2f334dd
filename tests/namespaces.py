"""Machines of one network on this one: Linux network namespaces, joined by a bridge. Needs root.

Each machine has an address of its own in 10.77.0.0/24 and sees nothing of this machine's network,
nor this one of theirs: the bridge stands in a namespace of its own. Files are shared.
"""

import contextlib
import os
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import psutil

_SUBNET = "10.77.0"
_END_S = 30  # for killed processes to vanish


class Network:
    """`with Network(4) as network:` all that it made is gone afterwards, and all that ran there."""

    def __init__(self, machines: int) -> None:
        self._prefix = f"quantfleet-{os.getpid()}"
        self._switch = f"{self._prefix}-switch"
        self._made: list[str] = []
        self._count = machines

    def __enter__(self) -> "Network":
        try:
            self._namespace(self._switch)
            _ip("-n", self._switch, "link", "add", "bridge", "type", "bridge")
            _ip("-n", self._switch, "link", "set", "bridge", "up")
            for number in range(self._count):
                self._connect(number)
        except BaseException:
            self._clean()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._clean()

    def address(self, machine: int) -> str:
        return f"{_SUBNET}.{machine + 1}"

    def start(
        self, machine: int, command: Sequence[str | Path], env: dict[str, str], log: Path | None
    ) -> subprocess.Popen[str]:
        """A command on a machine; its output goes to the log, or into pipes."""
        inside = ["ip", "netns", "exec", self._name(machine), *map(str, command)]
        if log is None:
            pipe = subprocess.PIPE
            return subprocess.Popen(inside, env=env, stdout=pipe, stderr=pipe, text=True)
        with log.open("w") as out:
            return subprocess.Popen(inside, env=env, stdout=out, stderr=out, text=True)

    def cut(self, machine: int) -> None:
        """Its cable is pulled: nobody is told."""
        _ip("-n", self._name(machine), "link", "set", "eth0", "down")

    def _name(self, machine: int) -> str:
        return f"{self._prefix}-{machine}"

    def _namespace(self, name: str) -> None:
        _ip("netns", "add", name)
        self._made.append(name)
        _ip("-n", name, "link", "set", "lo", "up")

    def _connect(self, machine: int) -> None:
        name, port = self._name(machine), f"port{machine}"
        self._namespace(name)
        peer = ("peer", "name", port, "netns", self._switch)
        _ip("-n", name, "link", "add", "eth0", "type", "veth", *peer)
        _ip("-n", self._switch, "link", "set", port, "master", "bridge")
        _ip("-n", self._switch, "link", "set", port, "up")
        _ip("-n", name, "address", "add", f"{self.address(machine)}/24", "dev", "eth0")
        _ip("-n", name, "link", "set", "eth0", "up")
        # nothing is there, but by it Ray finds the machine's own address
        _ip("-n", name, "route", "add", "default", "via", f"{_SUBNET}.254")

    def _clean(self) -> None:
        """Links go with their namespaces; a process would keep both."""
        end = time.monotonic() + _END_S
        while processes := [p for name in self._made for p in _processes(name)]:
            for process in processes:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(processes, timeout=1)  # others may have come meanwhile
            if time.monotonic() > end:
                break
        for name in reversed(self._made):
            _ip("netns", "delete", name)
        self._made.clear()


def _processes(namespace: str) -> list[psutil.Process]:
    found = []
    for pid in _ip("netns", "pids", namespace).split():
        try:
            found.append(psutil.Process(int(pid)))
        except psutil.NoSuchProcess:
            continue
    return found


def _ip(*arguments: str) -> str:
    command = ["ip", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout
