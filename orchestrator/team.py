"""The workers of a job: of one kind, or of every kind that there is (`workers.kind: mixed`)."""

import dataclasses
from dataclasses import dataclass

from orchestrator.fitting import Admission, Admitted, Job
from orchestrator.machines import Chosen
from quantcore.errors import Fault, ResourceError
from workers.capacity import Disk
from workers.plan import Plan
from workers.shelf import places


@dataclass(frozen=True)
class Team:
    """What was admitted of each kind, the fastest first; there is always one."""

    parts: tuple[tuple[Chosen, Admitted], ...]

    @property
    def devices(self) -> tuple[str, ...]:
        """The device of each worker."""
        return tuple(
            chosen.device
            for chosen, admitted in self.parts
            for _ in range(admitted.prediction.workers)
        )

    @property
    def states_on(self) -> str:
        """Where all hidden states wait from the start; '' for the place nearest to each worker."""
        pairs = [(chosen.device, admitted.prediction.states_on) for chosen, admitted in self.parts]
        lowered = [place for device, place in pairs if place != places(device)[0]]
        return max(lowered, key=places("cuda").index, default="")


def admit_team(job: Job, fleet: tuple[Chosen, ...], store: Disk | None) -> tuple[Team, list[Fault]]:
    """How many workers of each kind there will be; why there can be none.

    Of a mixed fleet, a kind that the job does not fit on is left out, and a note says why.
    """
    if len(fleet) == 1:
        admitted, faults = Admission(job, fleet[0], store).admit()
        return Team(((fleet[0], admitted),)), faults
    wanted = job.spec.workers.count
    parts: list[tuple[Chosen, Admitted]] = []
    refused: list[Fault] = []
    for chosen in fleet:
        left = None if wanted is None else wanted - len(Team(tuple(parts)).devices)
        if left == 0:
            break
        admitted, faults = _at_most(left, job, chosen, store)
        if faults:
            refused.append(faults[0])
        else:
            parts.append((chosen, admitted))
    if not parts:
        return Team(((chosen, admitted),)), refused
    notes = tuple(f"left out: {fault.message}" for fault in refused)
    first, admitted = parts[0]
    parts[0] = (first, dataclasses.replace(admitted, notes=(*admitted.notes, *notes)))
    team = Team(tuple(parts))
    found = len(team.devices)
    if wanted is not None and found < wanted:
        message = "; ".join([f"there is room for {found} workers of all kinds", *notes])
        fault = Fault(
            field="workers.count", message=f"{message}: write count: {found}", kind=ResourceError
        )
        return team, [fault]
    return team, []


def _at_most(
    count: int | None, job: Job, chosen: Chosen, store: Disk | None
) -> tuple[Admitted, list[Fault]]:
    """As many workers of one kind as there are devices and memory for, and not more than asked."""
    free = _counting(job, None, chosen)
    admitted, faults = Admission(free, chosen, store).admit()
    if faults or count is None or admitted.prediction.workers <= count:
        return admitted, faults
    return Admission(_counting(job, count, chosen), chosen, store).admit()


def _counting(job: Job, count: int | None, chosen: Chosen) -> Job:
    """The job for one kind alone, with a number of workers of its own."""

    def alone(plan: Plan) -> Plan:
        contract = dataclasses.replace(plan.contract, kind=chosen.kind)
        return dataclasses.replace(plan, contract=contract)

    workers = job.spec.workers.model_copy(update={"count": count})
    spec = job.spec.model_copy(update={"workers": workers})
    return Job(
        spec,
        alone(job.plan),
        job.architecture,
        job.source,
        lambda other: alone(job.replan(other)),
    )
