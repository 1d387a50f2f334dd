"""Connections to Ray: one of our own on this machine, or a cluster that is there.

The only file that imports Ray: the other ray_*.py are given it.
"""

import ipaddress
import logging
import os
from collections.abc import Sequence
from typing import Any

from quantcore.errors import ResourceError
from workers.machine import Machine, look

_LOOK_TIMEOUT_S = 120.0
_ON_LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
_HOW_TO_SIGN_IN = (
    "set RAY_AUTH_MODE=token, and the cluster's token in RAY_AUTH_TOKEN or its file in "
    "RAY_AUTH_TOKEN_PATH (~/.ray/auth_token if neither is set)"
)


def embedded(*, cpus: int, gpus: int, object_store: int | None = None) -> Any:
    """A Ray that listens on this machine alone and phones nowhere.

    Despite its name, the second variable decides on Linux too whether a node may be joined from
    outside; without that, every Ray server binds to 127.0.0.1. Ray's access token stays on, since
    other users of the machine can reach the loopback; only its notice is left out.
    """
    os.environ[_ON_LOOPBACK] = "0"
    os.environ.setdefault("RAY_worker_niceness", "0")  # this is the job that the user waits for
    ray = imported()
    try:
        ray.init(
            address="local",
            num_cpus=cpus,
            num_gpus=gpus,
            object_store_memory=object_store,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
            configure_logging=False,
        )
    except Exception as error:
        raise ResourceError(f"Ray does not start on this machine: {error}") from None
    return ray


def joined(address: str) -> Any:
    """A connection to a cluster of which this machine is a node.

    Ray replaces a loopback address by the machine's outer one, at which nodes that were started on
    the loopback do not answer. To those that were not, it gets either way.
    """
    if is_loopback(address):
        os.environ.setdefault(_ON_LOOPBACK, "0")
    ray = imported()
    try:
        ray.init(
            address=address, log_to_driver=False, logging_level="ERROR", configure_logging=False
        )
    except ConnectionError as error:  # this says no more, whatever the reason
        hint = f"if there is one that wants a token: {_HOW_TO_SIGN_IN}"
        raise ResourceError(f"no Ray cluster at {address}: {first_line(error)}; {hint}") from None
    except Exception as error:
        raise unreached(address, error) from None
    return ray


def is_loopback(address: str) -> bool:
    host = address.rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def unreached(address: str, error: Exception) -> ResourceError:
    """Why there is no connection to a cluster, for its users."""
    text = str(error)
    if "authenticat" not in text.lower():
        return ResourceError(f"no Ray cluster at {address}: {first_line(error)}")
    wants = "takes another token" if "Invalid" in text else "wants a token"
    return ResourceError(f"the Ray cluster at {address} {wants}: {_HOW_TO_SIGN_IN}")


def look_at_nodes(ray: Any, paths: Sequence[str]) -> list[Machine]:
    """Every node of a cluster that work can be sent to, as it sees itself."""
    affinity = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy
    asked = {}
    for node in ray.nodes():
        resources = node["Resources"]
        if not node["Alive"] or not {"CPU", "GPU"} & set(resources):
            continue
        options: dict[str, Any] = {
            "num_cpus": 0,
            # a sliver of a GPU, because without any Ray hides them
            "num_gpus": 0.001 if "GPU" in resources else 0,
            "max_retries": 0,
            "scheduling_strategy": affinity(node["NodeID"], soft=False),
        }
        ref = ray.remote(look).options(**options).remote(list(paths))
        asked[ref] = node
    answered, silent = ray.wait(list(asked), num_returns=len(asked), timeout=_LOOK_TIMEOUT_S)
    if silent:
        address = asked[silent[0]]["NodeManagerAddress"]
        raise ResourceError(f"node {address} did not answer in {_LOOK_TIMEOUT_S:.0f} s")
    machines = []
    for ref in answered:
        try:
            machine = ray.get(ref)
        except ray.exceptions.RayError as error:
            address = asked[ref]["NodeManagerAddress"]
            raise ResourceError(
                f"node {address} cannot be looked at: {first_line(error)}"
            ) from None
        machines.append(_as_ray_counts(machine, asked[ref]))
    if not machines:
        raise ResourceError("this Ray cluster has no node with CPUs or GPUs")
    return machines


def _as_ray_counts(machine: Machine, node: dict[str, Any]) -> Machine:
    """Ray lets work have what it was told of, which need not be all that is there."""
    from dataclasses import replace

    resources = node["Resources"]
    devices = {
        device: int(resources.get("CPU" if device == "cpu" else "GPU", 0))
        for device in machine.devices
    }
    devices = {device: count for device, count in devices.items() if count}
    return replace(
        machine,
        name=f"node {node['NodeManagerAddress']}",
        devices=devices,
        kinds={device: machine.kinds[device] for device in devices},
        node_id=node["NodeID"],
        object_store=int(resources.get("object_store_memory", 0)) or None,
    )


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def job_client(address: str) -> Any:
    """Ray's client for jobs, over HTTP."""
    from ray.job_submission import JobSubmissionClient

    return JobSubmissionClient(address)


def imported() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    import ray
    import ray.util.metrics
    import ray.util.scheduling_strategies

    return ray
