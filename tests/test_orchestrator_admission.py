"""What is predicted of shapes, and what is refused of machines, most of it without any file."""

import dataclasses
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.admission import Prediction, predict
from orchestrator.costs import rates_of
from orchestrator.fitting import Admission, Admitted, Job, object_store_size
from orchestrator.machines import choose
from orchestrator.planning import make_plan, plan_layers
from orchestrator.sizes import Sizes, quantized_bytes
from orchestrator.units import GIB, MIB
from quantcore.errors import Fault, ResourceError, StoreError
from quantcore.formats import FORMATS
from quantcore.moments import moment_tree
from quantcore.schemes import SCHEME_KINDS, Scheme, every_form
from tests.command import quantfleet
from tests.samples import architecture, job_spec
from workers.architecture import Architecture
from workers.capacity import Disk
from workers.machine import Machine
from workers.plan import LayerPlan
from workers.sources.base import TensorInfo

KINDS = {
    "cpu": {"device": "cpu", "name": "a CPU"},
    "cuda": {"device": "cuda", "name": "NVIDIA H200"},
}


class Source:
    """A llama's headers and nothing else."""

    path = "/nowhere/model.gguf"
    remote = False

    def __init__(self, model: Architecture, dtype: torch.dtype) -> None:
        self.tensors = dict(_tensors(model, dtype))
        self.companion_bytes = lambda: 2**25


def _tensors(model: Architecture, dtype: torch.dtype) -> Iterator[tuple[str, TensorInfo]]:
    outer = (model.vocabulary, model.hidden_size)
    yield "model.embed_tokens.weight", TensorInfo(dtype, outer)
    yield "lm_head.weight", TensorInfo(dtype, outer)
    for index, block in enumerate(model.blocks):
        norm = f"model.layers.{index}.input_layernorm.weight"
        yield norm, TensorInfo(dtype, (model.hidden_size,))
        for linear in block.linears():
            shape = (linear.out_features, linear.in_features)
            yield f"{linear.name}.weight", TensorInfo(dtype, shape)


def job(
    device: str = "cpu",
    blocks: int = 4,
    hidden: int = 4096,
    inner: int = 14336,
    dtype: torch.dtype = torch.bfloat16,
    **sections: Any,
) -> Job:
    """A model of Llama-3.1-8B's widths, unless said otherwise."""
    model = architecture(blocks, hidden, inner)
    usual = {"text": "/texts/t", "sequences": 128, "length": 2048}
    spec = job_spec(**{"compute_dtype": "bfloat16", "calibration": usual, **sections})
    layers, head, faults = plan_layers(spec, model)
    assert not faults

    def replan(other: Any) -> Any:
        return make_plan(other, layers, head, KINDS[device])

    source: Any = Source(model, dtype)
    return Job(spec, replan(spec), model, source, replan)


def machine(**facts: Any) -> Machine:
    """A large one with 16 cores; a cluster's node where it has an object store."""
    usual: dict[str, Any] = {
        "name": "here",
        "kinds": KINDS,
        "devices": {"cpu": 16},
        "memory_free": 256 * GIB,
        "paths": {},
        "host": "one",
        "shared_size": 128 * GIB,
        "shared_free": 128 * GIB,
        "scratch": Disk(1000 * GIB, 7),
    }
    return Machine(**{**usual, **facts})


def gpu(free: int, **facts: Any) -> Machine:
    return machine(devices={"cpu": 16, "cuda": 1}, device_free={"cuda": (free,)}, **facts)


def admit(
    wanted: Job, *machines: Machine, store: Disk | None = None
) -> tuple[Admitted, list[Fault]]:
    chosen = choose(machines, wanted.plan.contract.kind["device"])
    return Admission(wanted, chosen, store).admit()


def prediction_of(wanted: Job, workers: int = 1, states_on: str = "host") -> Prediction:
    sizes = Sizes(wanted.spec, wanted.plan, wanted.architecture, wanted.source, workers)
    rates = rates_of(wanted.plan.contract.kind, wanted.spec.compute_dtype, 1, {"float32": 9e10})
    return predict(sizes, states_on, rates)


def test_a_large_machine_takes_a_worker_for_each_core() -> None:
    admitted, faults = admit(job(hidden=512, inner=1024), machine())
    assert (faults, admitted.notes) == ([], ())
    assert (admitted.prediction.workers, admitted.prediction.states_on) == (16, "host")


def test_no_more_workers_than_memory_has_room_for() -> None:
    alone = prediction_of(job(), 4).private_bytes
    admitted, faults = admit(job(), machine(memory_free=5 * alone))
    assert not faults
    assert 1 <= admitted.prediction.workers <= 5
    need = admitted.prediction.private_bytes * admitted.prediction.workers
    assert need < 5 * alone


def test_nodes_of_one_host_share_its_memory() -> None:
    """Two Ray nodes on one machine see the same bytes; on two machines they have them twice."""
    node = {"memory_free": 40 * GIB, "object_store": 20 * GIB, "devices": {"cpu": 2}}
    together = [machine(name="a", **node), machine(name="b", **node)]
    apart = [machine(name="a", host="x", **node), machine(name="b", host="y", **node)]
    one, _ = admit(job(), *together)
    two, _ = admit(job(), *apart)
    assert one.prediction.workers < two.prediction.workers


def test_too_many_workers_are_told_how_many_would_do() -> None:
    wanted = job(workers={"count": 16})
    _, (fault,) = admit(wanted, machine(memory_free=64 * GIB))
    assert (fault.field, fault.kind) == ("workers.count", ResourceError)
    assert "64.0GiB free" in fault.message
    count = int(fault.message.rpartition("write count: ")[2])
    fewer = job(workers={"count": count})
    assert not admit(fewer, machine(memory_free=64 * GIB))[1]
    more, faults = admit(job(workers={"count": count + 1}), machine(memory_free=64 * GIB))
    assert faults or more.prediction.states_on == "disk"


def test_a_length_that_does_not_fit_is_told_which_would() -> None:
    calibration = {"text": "/t", "sequences": 16, "length": 1 << 17}
    _, (fault,) = admit(job(calibration=calibration), machine(memory_free=48 * GIB))
    assert fault.field == "workers.memory"
    assert "collect: products" in fault.message or "advance: products" in fault.message
    length = int(fault.message.rpartition("calibration.length: ")[2].removesuffix(" or less"))
    shorter = job(calibration={**calibration, "length": length})
    assert not admit(shorter, machine(memory_free=48 * GIB))[1]


def test_what_nothing_helps_is_refused_without_advice() -> None:
    _, (fault,) = admit(job(), machine(memory_free=2 * GIB))
    assert fault.field == "workers.memory"
    assert fault.message.endswith("this machine has 2.0GiB free")


def test_memory_that_the_job_allows_must_be_enough() -> None:
    _, (fault,) = admit(job(workers={"count": 1, "memory": "4GiB"}), machine())
    assert fault.field == "workers.memory"
    need = fault.message.rpartition("write memory: ")[2]
    assert not admit(job(workers={"count": 1, "memory": need}), machine())[1]


def test_hidden_states_move_down_before_anything_is_refused() -> None:
    """The same job on ever smaller devices: on the device, on the host, on disk, refused."""
    wanted = job("cuda", calibration={"text": "/t", "sequences": 512, "length": 2048})
    device = prediction_of(wanted, states_on="device").device_bytes
    host = prediction_of(wanted, states_on="host").private_bytes
    places = []
    for free, memory in ((device, 256 * GIB), (device - 1, 256 * GIB), (device - 1, host)):
        admitted, faults = admit(wanted, gpu(free, memory_free=memory))
        assert not faults
        places.append(admitted.prediction.states_on)
        assert bool(admitted.notes) == (places[-1] != "device")
    assert places == ["device", "host", "disk"]
    _, (fault,) = admit(wanted, gpu(4 * GIB))
    assert fault.field == "workers.kind"
    assert "4.0GiB free" in fault.message


def test_a_refused_device_is_told_how_large_one_would_do() -> None:
    _, (fault,) = admit(job("cuda"), gpu(6 * GIB))
    size = float(fault.message.partition("(a device with ")[2].partition("GiB")[0])
    assert not admit(job("cuda"), gpu(int((size + 0.1) * GIB)))[1]


def test_object_stores_of_a_cluster_must_hold_what_stands_at_once() -> None:
    node = machine(name="node 10.0.0.1", object_store=200 * MIB, devices={"cpu": 2})
    _, faults = admit(job(workers={"count": 2}), node)
    assert [fault.field for fault in faults] == ["workers.count"]
    size = int(faults[0].message.partition("--object-store-memory=")[2].partition(":")[0])
    larger = dataclasses.replace(node, object_store=size)
    assert not admit(job(workers={"count": 2}), larger)[1]


def test_an_embedded_object_store_is_as_large_as_it_has_to_be() -> None:
    predicted = prediction_of(job(), 2)
    whole = sum(predicted.object_store.values())
    assert object_store_size(predicted, machine()) == 2 * whole
    assert whole < object_store_size(predicted, machine(shared_free=6 * GIB)) < 6 * GIB
    # Docker's usual 64 MiB are too few for Ray, which then goes elsewhere
    assert object_store_size(predicted, machine(shared_free=64 * MIB)) >= whole
    assert object_store_size(predicted, machine(shared_free=None)) >= whole


def test_objects_that_do_not_fit_in_shared_memory_are_announced() -> None:
    admitted, faults = admit(job(workers={"count": 2}), machine(shared_free=1 * GIB))
    assert not faults
    assert "writes more of them to disk" in admitted.notes[0]


def test_temporary_files_and_the_artifact_need_disk() -> None:
    _, (fault,) = admit(job(), machine(scratch=Disk(10 * MIB, 7)))
    assert (fault.field, fault.kind) == ("workers", ResourceError)
    assert "set TMPDIR" in fault.message
    _, (fault,) = admit(job(), machine(), store=Disk(100 * MIB, 8))
    assert (fault.field, fault.kind) == ("output.store", StoreError)
    assert not admit(job(), machine(), store=Disk(20 * GIB, 8))[1]


def test_a_store_beside_the_temporary_files_has_what_they_leave() -> None:
    admitted, _ = admit(job(), machine())
    enough = sum(admitted.prediction.store.values())
    assert not admit(job(), machine(), store=Disk(enough, 8))[1]
    _, (fault,) = admit(job(), machine(), store=Disk(enough, 7))
    assert "beside" in fault.message


def test_more_shards_may_have_more_workers() -> None:
    calibration = {"text": "/t", "sequences": 128, "length": 128, "shards": 2}
    wanted = job(calibration=calibration, workers={"count": 33}, hidden=512, inner=1024)
    _, (fault,) = admit(wanted, machine(devices={"cpu": 64}))
    assert fault.message.endswith("write count: 32")


@pytest.mark.parametrize("hands", [1, 2, 3, 5, 16])
def test_nodes_are_those_of_the_real_tree(hands: int) -> None:
    wanted = job()
    sizes = Sizes(wanted.spec, wanted.plan, wanted.architecture, wanted.source, hands)
    growing, held = [], []
    for run in sizes._runs():
        tree = moment_tree(wanted.plan.contract.chunks, 1, torch.device("cpu"))
        for chunk in run:
            tree.add(chunk, torch.ones(1, 1))
            growing.append(len(tree.nodes))
        tree.close()
        held.append(len(tree.nodes))
    assert sizes.nodes == sum(held)
    assert sizes.nodes_held == max(held)
    assert max(growing) <= sizes.nodes_growing <= max(growing) + 1


def test_every_part_grows_with_what_it_is_for() -> None:
    small, large = prediction_of(job(blocks=2)), prediction_of(job(blocks=4))
    assert large.store["artifact"] > 1.5 * small.store["artifact"] - 300 * MIB
    assert large.network["of the model"] > small.network["of the model"]
    assert large.seconds["quantize"] == pytest.approx(2 * small.seconds["quantize"], rel=0.1)
    assert large.host["solve"] == small.host["solve"]
    two = prediction_of(job(blocks=4), workers=2)
    assert two.seconds["quantize"] < large.seconds["quantize"]
    assert two.host["collect"]["hidden states"] < large.host["collect"]["hidden states"]
    assert two.object_store["hand-overs"] > 0


def test_a_remote_model_is_fetched_once_by_each_and_the_next_block_has_room() -> None:
    here, there = job(), job()
    source: Any = there.source
    source.remote = True
    near, far = (prediction_of(wanted, workers=2) for wanted in (here, there))
    block = Sizes(here.spec, here.plan, here.architecture, here.source, 2).block_stored(0)
    for phase in ("collect", "solve", "publish", "advance"):
        assert far.host[phase]["read ahead"] == block
        assert "read ahead" not in near.host[phase]
    assert far.host["solve"]["block"] == near.host["solve"]["block"] + block
    assert far.host_bytes > near.host_bytes
    outside = 2 * 2 * 32000 * 4096  # surveyed; embedded by each, and copied
    assert far.network["of the model"] == (1 + 2) * 4 * block + (1 + 2 + 1) * outside
    assert far.network["of the model"] < near.network["of the model"]


def test_a_plain_rounding_is_predicted_as_well() -> None:
    wanted = job(calibration=None, quantization={"scheme": "int4", "method": "rtn"})
    admitted, faults = admit(wanted, machine(memory_free=16 * GIB))
    assert not faults
    assert set(admitted.prediction.host) == {"survey", "outside", "round"}
    _, (fault,) = admit(
        job(
            calibration=None,
            quantization={"scheme": "int4", "method": "rtn"},
            workers={"count": 9},
        ),
        machine(),
    )
    assert fault.message == "only 4 workers can share these blocks: write count: 4"


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(
    "scheme",
    [scheme for name in SCHEME_KINDS for scheme in every_form(name, [32, 128])],
    ids=Scheme.label,
)
def test_a_quantized_linear_is_no_larger_than_predicted(scheme: Scheme, form: str) -> None:
    from quantcore.affine import choose_qparams, quantize
    from quantcore.formats import QuantizedLinear

    if FORMATS[form].refusal("Linear", scheme):
        return
    w_OI = torch.randn(72, 384)
    qparams = choose_qparams(w_OI, scheme, stored=torch.bfloat16)
    linear = QuantizedLinear(quantize(w_OI, qparams, scheme), qparams, scheme)
    tensors = FORMATS[form].encode(linear, torch.bfloat16)
    actual = sum(tensor.nbytes for tensor in tensors.values())
    layer = LayerPlan(name="l", out_features=72, in_features=384, scheme=scheme, method="rtn")
    assert actual <= quantized_bytes(layer, 2, form) <= 1.2 * actual + 3 * 256


def test_check_shows_what_is_predicted(job_file: Callable[..., Path]) -> None:
    shown = quantfleet("check", job_file("job"))
    assert shown.code == 0
    for row in ("host memory", "object store", "scratch disk", "store", "read and sent", "time"):
        assert f"\n{row}" in shown.out
    told = json.loads(quantfleet("check", job_file("job"), "--json").out)["predicted"]
    phases = told["worker"]["host"]["phases"]
    assert told["worker"]["host"]["bytes"] == max(sum(parts.values()) for parts in phases.values())
    assert set(told["job"]["seconds"]) == {"start", "survey", "quantize"}


def test_a_refusal_stands_at_its_line(job_file: Callable[..., Path]) -> None:
    shown = quantfleet("check", job_file("job", workers={"count": 1, "memory": "100MiB"}))
    assert shown.code == 4
    assert re.search(r"job\.yaml:\d+:\d+: workers\.memory: .*write memory: \d", shown.err)
