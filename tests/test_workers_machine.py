"""What a machine says it has, over made-up trees of cgroups."""

import pickle
from pathlib import Path

import psutil
import pytest
import torch

import workers.capacity
from workers.capacity import disk, host_identity, memory_free, shared_memory
from workers.machine import look

MIB = 2**20
GIB = 2**30


@pytest.fixture(autouse=True)
def _plenty(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with 64 GiB to spare, whatever this one has."""
    memory = psutil.virtual_memory()._replace(available=64 * GIB)
    monkeypatch.setattr(workers.capacity.psutil, "virtual_memory", lambda: memory)


def _write(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (folder / name.replace("__", ".")).write_text(f"{value}\n")


def _version_2(folder: Path, most: object, used: int, inactive: int = 0) -> None:
    stat = f"anon {used}\ninactive_file {inactive}\nactive_file 7"
    _write(folder, memory__max=most, memory__current=used, memory__stat=stat)


def _version_1(folder: Path, most: int, used: int, inactive: int = 0) -> None:
    stat = f"cache 9\ntotal_inactive_file {inactive}"
    _write(folder, memory__limit_in_bytes=most, memory__usage_in_bytes=used, memory__stat=stat)


def _process(root: Path, lines: str, boot: str = "one-boot") -> None:
    _write(root / "proc/self", cgroup=lines)
    _write(root / "proc/sys/kernel/random", boot_id=boot)


def test_without_cgroups_it_is_what_the_machine_has(tmp_path: Path) -> None:
    assert memory_free(tmp_path) == 64 * GIB
    _process(tmp_path, "0::/user.slice")
    assert memory_free(tmp_path) == 64 * GIB


def test_a_limit_of_version_2_counts_less_its_use(tmp_path: Path) -> None:
    _process(tmp_path, "0::/pod/container")
    top = tmp_path / "sys/fs/cgroup"
    _version_2(top / "pod/container", 8 * GIB, 3 * GIB)
    assert memory_free(tmp_path) == 5 * GIB


def test_cached_files_that_nobody_uses_are_no_use(tmp_path: Path) -> None:
    _process(tmp_path, "0::/c")
    _version_2(tmp_path / "sys/fs/cgroup/c", 8 * GIB, 6 * GIB, inactive=2 * GIB)
    assert memory_free(tmp_path) == 4 * GIB


def test_the_tightest_on_the_way_up_counts(tmp_path: Path) -> None:
    _process(tmp_path, "0::/a/b/c")
    top = tmp_path / "sys/fs/cgroup"
    _version_2(top / "a/b/c", 32 * GIB, GIB)
    _version_2(top / "a/b", 4 * GIB, 3 * GIB)
    _version_2(top / "a", "max", 20 * GIB)
    assert memory_free(tmp_path) == GIB


@pytest.mark.parametrize("top", ["sys/fs/cgroup", "sys/fs/cgroup/unified"])
def test_no_limit_is_none(tmp_path: Path, top: str) -> None:
    _process(tmp_path, "0::/a")
    _version_2(tmp_path / top / "a", "max", 70 * GIB)
    assert memory_free(tmp_path) == 64 * GIB


def test_a_limit_of_version_1_counts_as_well(tmp_path: Path) -> None:
    _process(tmp_path, "9:cpu,cpuacct:/x\n4:memory:/docker/abc\n0::/")
    top = tmp_path / "sys/fs/cgroup/memory"
    _version_1(top / "docker/abc", 6 * GIB, 3 * GIB, inactive=GIB)
    _version_1(top / "docker", 2**63 - 4096, 30 * GIB)
    assert memory_free(tmp_path) == 4 * GIB
    (top / "docker/abc/memory.limit_in_bytes").write_text(str(2**63 - 4096))
    assert memory_free(tmp_path) == 64 * GIB


@pytest.mark.parametrize("path", ["/kubepods/pod7/c1", "/../outside", "/"])
def test_a_container_finds_its_own_cgroup_at_the_top(tmp_path: Path, path: str) -> None:
    """What the host calls it is not there, or is above."""
    _process(tmp_path, f"0::{path}")
    _version_2(tmp_path / "sys/fs/cgroup", 2 * GIB, GIB)
    assert memory_free(tmp_path) == GIB


def test_more_in_use_than_allowed_leaves_nothing(tmp_path: Path) -> None:
    _process(tmp_path, "0::/c")
    _version_2(tmp_path / "sys/fs/cgroup/c", GIB, 2 * GIB)
    assert memory_free(tmp_path) == 0


def test_files_that_do_not_read_are_passed_over(tmp_path: Path) -> None:
    _process(tmp_path, "0::/a/c")
    top = tmp_path / "sys/fs/cgroup"
    _write(top / "a/c", memory__max="1000")  # and nothing beside it
    _version_2(top / "a", 3 * GIB, GIB)
    assert memory_free(tmp_path) == 2 * GIB


def test_who_draws_on_the_same_memory_is_one_host(tmp_path: Path) -> None:
    first, second, other = (tmp_path / name for name in ("first", "second", "other"))
    for root, boot in ((first, "x"), (second, "x"), (other, "y")):
        _process(root, "0::/c", boot)
    assert host_identity(first) == host_identity(second) != host_identity(other)


def test_containers_with_limits_of_their_own_are_hosts_of_their_own(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for root in (first, second):
        _process(root, "0::/")
        _version_2(root / "sys/fs/cgroup", 4 * GIB, GIB)
    assert host_identity(first) != host_identity(second)


def test_cgroups_under_one_limit_are_one_host(tmp_path: Path) -> None:
    _process(tmp_path, "0::/pod/a")
    top = tmp_path / "sys/fs/cgroup"
    _version_2(top / "pod", 4 * GIB, GIB)
    _version_2(top / "pod/a", "max", GIB)
    _version_2(top / "pod/b", 60 * GIB, 0)
    first = host_identity(tmp_path)
    _process(tmp_path, "0::/pod/b")
    assert host_identity(tmp_path) == first


def test_shared_memory_is_none_where_there_is_none(tmp_path: Path) -> None:
    assert shared_memory(tmp_path) is None
    (tmp_path / "dev/shm").mkdir(parents=True)
    found = shared_memory(tmp_path)
    assert found is not None
    assert 0 < found[1] <= found[0]


def test_a_folder_that_is_yet_to_be_made_is_where_its_parent_is(tmp_path: Path) -> None:
    assert disk(tmp_path / "a/b/c").device == tmp_path.stat().st_dev
    assert disk(tmp_path / "a/b/c").free > 0
    assert not (tmp_path / "a").exists()


def test_a_look_travels_and_leaves_threads_as_they_were() -> None:
    threads = torch.get_num_threads()
    workers.kind.cpu_flops.cache_clear()
    machine = look([])
    assert torch.get_num_threads() == threads
    assert pickle.loads(pickle.dumps(machine)) == machine
    assert machine.memory_free > 0
    assert machine.scratch is not None
    assert min(machine.flops.values()) > 1e6
