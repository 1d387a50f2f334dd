"""Fleets of several kinds: what is taken of which machine, and what slow workers are not given."""

import dataclasses
from typing import Any

import pytest

from orchestrator.bag import Bag
from orchestrator.holdings import Holdings
from orchestrator.machines import choose_fleet
from orchestrator.scheduler import Stop
from orchestrator.team import admit_team
from orchestrator.units import GIB
from orchestrator.works import quantization_works
from quantcore.errors import ResourceError
from tests.fleet import Fleet
from tests.samples import plan
from tests.test_orchestrator_admission import KINDS, gpu, job, machine
from workers.machine import Machine
from workers.plan import MIXED
from workers.tasks import Collect, Evaluate, Reduce, Solve, Survey

OLD_CPU = {"device": "cpu", "name": "an older CPU"}
GPU_SPEED, CPU_SPEED = 6e14, 1e11


def cpu_machine(name: str, kind: dict[str, str] = KINDS["cpu"], **facts: Any) -> Machine:
    return machine(name=name, host=name, kinds={"cpu": kind}, **facts)


class TestChoice:
    def test_every_kind_and_no_core_beside_an_accelerator(self) -> None:
        machines = [cpu_machine("a"), gpu(100 * GIB, name="b"), cpu_machine("c", OLD_CPU)]
        machines += [cpu_machine("d")]
        fleet = choose_fleet(machines, "mixed")
        found = [(part.device, [m.name for m in part.machines]) for part in fleet]
        assert found[0] == ("cuda", ["b"])
        assert sorted(found[1:]) == [("cpu", ["a", "d"]), ("cpu", ["c"])]

    def test_one_kind_unless_all_are_asked_for(self) -> None:
        machines = [cpu_machine("a"), gpu(100 * GIB)]
        (only,) = choose_fleet(machines, "auto")
        assert only.device == "cuda"


class TestTeam:
    def wanted(self, **workers: Any) -> Any:
        return job("cpu", workers={"kind": "mixed", **workers})

    def fleet(self, *machines: Machine) -> Any:
        return choose_fleet(machines, "mixed")

    def test_all_devices_there_are(self) -> None:
        fleet = self.fleet(gpu(100 * GIB), cpu_machine("a", devices={"cpu": 2}))
        team, faults = admit_team(self.wanted(), fleet, None)
        assert not faults
        assert team.devices == ("cuda", "cpu", "cpu")

    def test_the_fastest_first_if_fewer_are_asked_for(self) -> None:
        fleet = self.fleet(cpu_machine("a"), gpu(100 * GIB, name="b"), gpu(90 * GIB, name="c"))
        team, _ = admit_team(self.wanted(count=3), fleet, None)
        assert team.devices == ("cuda", "cuda", "cpu")
        team, _ = admit_team(self.wanted(count=1), fleet, None)
        assert team.devices == ("cuda",)

    def test_a_kind_without_room_is_left_out_and_named(self) -> None:
        fleet = self.fleet(gpu(100 * GIB), cpu_machine("a", memory_free=GIB))
        team, faults = admit_team(self.wanted(), fleet, None)
        assert (team.devices, faults) == (("cuda",), [])
        (note,) = (n for n in team.parts[0][1].notes if n.startswith("left out"))
        assert "has 1.0GiB free" in note

    def test_more_than_there_are_is_refused(self) -> None:
        fleet = self.fleet(gpu(100 * GIB), cpu_machine("a", devices={"cpu": 2}))
        _, (fault,) = admit_team(self.wanted(count=4), fleet, None)
        assert (fault.field, fault.kind) == ("workers.count", ResourceError)
        assert fault.message.endswith("write count: 3")

    def test_no_room_anywhere_is_refused(self) -> None:
        fleet = self.fleet(cpu_machine("a", memory_free=GIB), cpu_machine("b", memory_free=GIB))
        _, (fault, *_) = admit_team(self.wanted(), fleet, None)
        assert fault.kind is ResourceError


class TestShares:
    def test_before_anything_was_seen_shares_follow_the_speeds(self) -> None:
        holdings = Holdings(16)
        holdings.joined(0, 3e14)
        holdings.joined(1, 1e14)
        holdings.joined(2, 1e11)
        assert holdings.quotas() == {0: 12, 1: 4, 2: 0}

    def test_what_was_seen_counts_more_and_scales_the_rest(self) -> None:
        """Worker 0 takes 2 s for what its speed says; worker 1 of a quarter of it is new."""
        holdings = Holdings(16)
        holdings.joined(0, 4e14)
        holdings.joined(1, 1e14)
        holdings.note(0, "Collect", 1.0)
        holdings.note(0, "Advance", 1.0)
        assert holdings.expected() == {0: 2.0, 1: 8.0}
        assert (holdings.slowness(0), holdings.slowness(1)) == (1.0, 4.0)


class TestSlowWorkers:
    def fleet(self) -> Fleet:
        mixed = plan(4)
        contract = dataclasses.replace(mixed.contract, kind=MIXED)
        mixed = dataclasses.replace(mixed, contract=contract)
        return Fleet(mixed, quantization_works(mixed, set()))

    def test_a_core_beside_a_gpu_is_given_neither_chunks_nor_solves(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("orchestrator.block.BAND_BYTES", 1)
        site = self.fleet()
        site.join(speed=GPU_SPEED)
        site.join(speed=CPU_SPEED)
        given: list[type] = []
        while site.stopped is None:
            slow = site.workers[1].doing
            given += [type(slow.task)] if slow else []
            site.finish(site.busy()[-1], 1.0)
        assert site.stopped == Stop(complete=True)
        assert not {Solve, Collect} & set(given)
        assert Reduce in given

    def test_it_does_all_of_it_once_the_gpu_is_gone(self) -> None:
        site = self.fleet()
        site.join(speed=GPU_SPEED)
        site.join(speed=CPU_SPEED)
        while len(site.published) < 2:
            site.finish(site.busy()[-1], 1.0)
        site.lose(0, parts_kept=False)
        while site.stopped is None:
            site.finish(1, 1.0)
        assert site.stopped == Stop(complete=True)
        assert sorted(site.published) == [0, 1, 2, 3]

    @pytest.mark.parametrize("heavy", [True, False])
    def test_a_bag_of_heavy_tasks_waits_for_who_is_fast(self, heavy: bool) -> None:
        tasks = {f"t/{n}": Survey(()) if not heavy else _evaluation() for n in range(3)}
        bag = Bag(tasks, heavy=heavy)
        bag.joined(0, GPU_SPEED)
        bag.joined(1, CPU_SPEED)
        assert (bag.offer(1) is None) == heavy
        assert bag.offer(0) is not None
        bag.lost(0, parts_kept=False)
        assert bag.offer(1) is not None

    def test_like_ones_share_heavy_tasks(self) -> None:
        bag = Bag({f"t/{n}": _evaluation() for n in range(2)}, heavy=True)
        bag.joined(0, 1.0)
        bag.joined(1, 0.9)
        assert bag.offer(1) is not None
        assert bag.offer(0) is not None


def _evaluation() -> Evaluate:
    from jobs.spec import EvaluationSpec

    return Evaluate("original", EvaluationSpec(tasks=("t",)), None)
