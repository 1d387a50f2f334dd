"""On which node of a cluster a worker is asked for: where most is free, on no node of another kind.

A worker is asked for on one node, and Ray may take any other one that was not refused. So a node
that joins later gets workers too: what it is shows when one starts there. Nodes are refused for
good, by Ray's id; a machine that was started anew is a new node.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from workers.machine import Machine
from workers.plan import MIXED

_NODE = "ray.io/node-id"
_NO_NODE = "none"


def of_another_kind(
    machines: Iterable[Machine], device: str, kind: Mapping[str, str]
) -> frozenset[str]:
    """The nodes of a cluster that a job of this kind can have no workers on."""
    if kind == MIXED:
        return frozenset()
    return frozenset(m.node_id for m in machines if m.node_id and m.kinds.get(device) != kind)


def freest(
    nodes: Sequence[Mapping[str, Any]], asks: Mapping[str, float], taken: Mapping[str, int]
) -> str | None:
    """The node with room for the most workers beside those it has; None if no node is known.

    `nodes` as Ray lists them, without refused ones; `asks` is what a worker takes of each resource.
    """
    room = {}
    for node in nodes:
        has = node["Resources"]
        fits = min(int(has.get(resource, 0) / amount) for resource, amount in asks.items())
        if node["Alive"] and fits > 0:
            room[node["NodeID"]] = fits - taken.get(node["NodeID"], 0)
    return max(sorted(room), key=lambda node: room[node]) if room else None


def selectors(target: str | None, refused: Iterable[str]) -> dict[str, Any]:
    """Options of an actor: on the target, or where Ray has room among nodes not refused."""
    # an empty list is no selector for Ray
    allowed = {_NODE: f"!in({','.join(sorted(refused)) or _NO_NODE})"}
    if target is None:
        return {"label_selector": allowed}
    fallback = [{"label_selector": allowed}]
    return {"label_selector": {_NODE: target}, "fallback_strategy": fallback}
