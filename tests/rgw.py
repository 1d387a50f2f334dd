"""A real S3 server for the length of a test: Ceph's radosgw over one monitor and one OSD in memory.

Debian's packages radosgw, ceph-mon and ceph-osd; everything listens on the loopback alone.
"""

import contextlib
import shutil
import socket
import subprocess
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest

KEY, SECRET = "quantfleet-test", "quantfleet-test-secret"
_START_S = 120

_CONF = """
[global]
fsid = {fsid}
mon host = [v2:127.0.0.1:{mon_port}]
mon initial members = a
auth_cluster_required = none
auth_service_required = none
auth_client_required = none
osd pool default size = 1
mon allow pool size one = true
mon data = {folder}/mon
osd data = {folder}/osd
run dir = {folder}
pid file =
admin socket =
log file = {folder}/$name.log
public addr = 127.0.0.1
cluster addr = 127.0.0.1
[osd]
osd objectstore = memstore
memstore device bytes = 1073741824
[client]
rgw frontends = beast endpoint=127.0.0.1:{port}
"""


@dataclass(frozen=True, slots=True)
class Gateway:
    url: str

    def environment(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
        }


@contextlib.contextmanager
def radosgw(folder: Path) -> Iterator[Gateway]:
    """Start the servers below `folder` and end them again; skips where Ceph is not installed."""
    needed = ("ceph", "ceph-mon", "ceph-osd", "radosgw", "radosgw-admin", "monmaptool")
    if missing := [name for name in needed if shutil.which(name) is None]:
        pytest.skip(f"needs Debian's radosgw, ceph-mon and ceph-osd: no {missing[0]}")
    with contextlib.ExitStack() as stack:
        mon_port, port = _free_port(), _free_port()
        fsid, osd = str(uuid.uuid4()), str(uuid.uuid4())
        conf = folder / "ceph.conf"
        conf.write_text(_CONF.format(fsid=fsid, mon_port=mon_port, port=port, folder=folder))
        for name in ("mon", "osd"):
            (folder / name).mkdir()
        monmap, mon = str(folder / "monmap"), f"[v2:127.0.0.1:{mon_port}]"
        _call("monmaptool", "--create", "--fsid", fsid, "--addv", "a", mon, monmap)
        _call("ceph-mon", "--mkfs", "-i", "a", "--monmap", monmap, "-c", conf)
        stack.enter_context(_server(folder, "ceph-mon", "-i", "a", "-f", "-c", conf))
        ceph = ("ceph", "-c", conf, "--connect-timeout", "60")
        _call(*ceph, "osd", "new", osd)
        _call("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd, "-c", conf)
        _call(*ceph, "osd", "crush", "add", "osd.0", "1.0", "root=default", "host=here")
        stack.enter_context(_server(folder, "ceph-osd", "-i", "0", "-f", "-c", conf))
        user = ("user", "create", "--uid=test", "--display-name=test")
        keys = (f"--access-key={KEY}", f"--secret-key={SECRET}")
        _call("radosgw-admin", "-c", conf, *user, *keys)
        options = ("-n", "client.admin", "--ms_mon_client_mode=crc", "--auth_client_required=none")
        stack.enter_context(_server(folder, "radosgw", *options, "-f", "-c", conf))
        gateway = Gateway(f"http://127.0.0.1:{port}")
        _wait_for(gateway.url)
        yield gateway


def make_bucket(gateway: Gateway, name: str) -> str:
    import s3fs

    store = s3fs.S3FileSystem(
        key=KEY, secret=SECRET, endpoint_url=gateway.url, skip_instance_cache=True
    )
    store.mkdir(name)
    return f"s3://{name}"


@contextlib.contextmanager
def _server(folder: Path, *command: str | Path) -> Iterator[None]:
    with (folder / f"{command[0]}.out").open("wb") as out:
        process = subprocess.Popen([*map(str, command)], stdout=out, stderr=out)
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _call(*command: str | Path) -> None:
    done = subprocess.run(
        [*map(str, command)], capture_output=True, text=True, timeout=_START_S, check=False
    )
    assert done.returncode == 0, f"{command}: {done.stderr}"


def _wait_for(url: str) -> None:
    end = time.monotonic() + _START_S
    while True:
        try:
            urlopen(url, timeout=5).close()
            return
        except (URLError, OSError):
            assert time.monotonic() < end, f"{url} does not answer"
            time.sleep(0.5)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
