"""Where workers are asked for: the nodes of a cluster as Ray lists them."""

from typing import Any

from orchestrator.placement import freest, of_another_kind, selectors
from workers.machine import Machine


def _node(name: str, *, alive: bool = True, **resources: float) -> dict[str, Any]:
    return {"NodeID": name, "Alive": alive, "Resources": resources}


def _spread(nodes: list[dict[str, Any]], workers: int, **asks: float) -> list[str]:
    taken: dict[str, int] = {}
    for _ in range(workers):
        node = freest(nodes, asks, taken)
        assert node is not None
        taken[node] = taken.get(node, 0) + 1
    return [taken.get(node["NodeID"], 0) for node in nodes]


def test_workers_are_spread_by_what_is_free() -> None:
    assert _spread([_node("a", CPU=4), _node("b", CPU=4)], 6, CPU=1) == [3, 3]
    assert _spread([_node("a", CPU=8), _node("b", CPU=2)], 8, CPU=1) == [7, 1]
    assert _spread([_node("a", CPU=8), _node("b", CPU=6)], 5, CPU=2) == [3, 2]


def test_every_resource_counts() -> None:
    nodes = [_node("a", CPU=64, GPU=1, memory=1e12), _node("b", CPU=8, GPU=4, memory=3e9)]
    assert _spread(nodes, 4, CPU=1, GPU=1, memory=1e9) == [1, 3]
    assert _spread(nodes[1:], 1, CPU=1, GPU=1, memory=3e9) == [1]
    assert freest(nodes[1:], {"CPU": 1, "GPU": 1, "memory": 4e9}, {}) is None


def test_nodes_that_are_dead_or_too_small_are_no_targets() -> None:
    nodes = [_node("dead", alive=False, CPU=8), _node("head", CPU=0), _node("memory", memory=1e9)]
    assert freest(nodes, {"CPU": 1}, {}) is None
    assert freest([*nodes, _node("b", CPU=1)], {"CPU": 1}, {"b": 5}) == "b"


def test_ray_may_take_any_node_that_was_not_refused() -> None:
    assert selectors("a", ["z", "y"]) == {
        "label_selector": {"ray.io/node-id": "a"},
        "fallback_strategy": [{"label_selector": {"ray.io/node-id": "!in(y,z)"}}],
    }
    assert selectors(None, ["z"]) == {"label_selector": {"ray.io/node-id": "!in(z)"}}


def test_nodes_of_another_kind_and_those_without_the_device_are_told_apart() -> None:
    def machine(node_id: str, **kinds: dict[str, str]) -> Machine:
        devices = dict.fromkeys(kinds, 1)
        return Machine(
            name=node_id, kinds=kinds, devices=devices, memory_free=1, paths={}, node_id=node_id
        )

    kind = {"device": "cuda", "name": "H200"}
    machines = [
        machine("same", cuda=dict(kind), cpu={"device": "cpu"}),
        machine("other", cuda={"device": "cuda", "name": "H100"}),
        machine("none", cpu={"device": "cpu"}),
        machine("", cuda={"device": "cuda", "name": "L4"}),
    ]
    assert of_another_kind(machines, "cuda", kind) == {"other", "none"}
