"""Files of deploy/: checked by the schemas of those who read them; the local nodes for real."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from jobs.load import read_document, validate

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
NODES = DEPLOY / "two_nodes.py"
KINDS = {"RayCluster": "raycluster.yaml", "RayJob": "rayjob.yaml"}
SECRETS = {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "RAY_AUTH_TOKEN"}
KUBERNETES = "1.34"

Path_ = tuple[str | int, ...]


def manifest(kind: str) -> dict[str, Any]:
    found = [d for d in documents(KINDS[kind]) if d["kind"] == kind]
    assert len(found) == 1
    return found[0]


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((DEPLOY / "kubernetes" / name).read_text()))


def cluster_spec(kind: str) -> dict[str, Any]:
    spec: dict[str, Any] = manifest(kind)["spec"]
    return spec.get("rayClusterSpec", spec)


def templates(kind: str) -> dict[str, dict[str, Any]]:
    """Every pod template of a manifest, by what it is for."""
    spec = cluster_spec(kind)
    found = {"head": spec["headGroupSpec"]["template"]}
    found |= {group["groupName"]: group["template"] for group in spec["workerGroupSpecs"]}
    if kind == "RayJob":
        found["submitter"] = manifest(kind)["spec"]["submitterPodTemplate"]
    return found


POD_TEMPLATES = [(kind, name) for kind in KINDS for name in templates(kind)]


def unknown_fields(schema: dict[str, Any], value: Any, at: Path_ = ()) -> Iterator[Path_]:
    """Fields that a CRD's schema does not name: Kubernetes would drop them without a word."""
    if isinstance(value, list):
        for number, item in enumerate(value):
            yield from unknown_fields(schema.get("items", {}), item, (*at, number))
    if not isinstance(value, dict) or schema.get("x-kubernetes-preserve-unknown-fields"):
        return
    known, others = schema.get("properties", {}), schema.get("additionalProperties")
    for key, inner in value.items():
        below = (*at, key)
        if below == ("metadata",):  # every object's own, which CRDs do not describe
            continue
        if key in known:
            yield from unknown_fields(known[key], inner, below)
        elif isinstance(others, dict):
            yield from unknown_fields(others, inner, below)
        elif others is not True:
            yield below


def test_the_walker_finds_fields_that_a_schema_does_not_know() -> None:
    schema = {
        "properties": {
            "a": {"items": {"properties": {"b": {}}}},
            "map": {"additionalProperties": {"type": "string"}},
            "free": {"x-kubernetes-preserve-unknown-fields": True},
        }
    }
    right = {"a": [{"b": 1}], "map": {"x": "y"}, "free": {"x": 1}, "metadata": {"x": 1}}
    assert list(unknown_fields(schema, right)) == []
    wrong = {"a": [{"b": 1}, {"c": 1}], "d": 1}
    assert list(unknown_fields(schema, wrong)) == [("a", 1, "c"), ("d",)]


@pytest.mark.parametrize("kind", KINDS)
def test_manifests_fit_the_schemas_of_kuberay(kind: str) -> None:
    from jsonschema import Draft7Validator

    folder = os.environ.get("QUANTFLEET_KUBERAY_CRDS")
    if folder is None:
        pytest.skip("by hand: QUANTFLEET_KUBERAY_CRDS names a folder with KubeRay's CRDs")
    crd = yaml.safe_load((Path(folder) / f"ray.io_{kind.lower()}s.yaml").read_text())
    found = manifest(kind)
    assert found["apiVersion"] == "ray.io/v1"
    (version,) = [v for v in crd["spec"]["versions"] if v["name"] == "v1"]
    schema = version["schema"]["openAPIV3Schema"]
    assert [f"{e.json_path}: {e.message}" for e in Draft7Validator(schema).iter_errors(found)] == []
    assert list(unknown_fields(schema, found)) == []


@pytest.mark.parametrize(("kind", "name"), POD_TEMPLATES)
def test_pod_templates_are_what_kubernetes_takes(kind: str, name: str) -> None:
    import kubernetes_validate

    template = {
        "apiVersion": "v1",
        "kind": "PodTemplate",
        "metadata": {"name": name},
        "template": templates(kind)[name],
    }
    kubernetes_validate.validate(template, KUBERNETES, strict=True)


def test_a_pod_template_with_a_wrong_field_is_refused() -> None:
    import kubernetes_validate

    template = {
        "apiVersion": "v1",
        "kind": "PodTemplate",
        "metadata": {"name": "wrong"},
        "template": {"spec": {"containers": [{"name": "a", "imagePolicy": "Always"}]}},
    }
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(template, KUBERNETES, strict=True)


@pytest.mark.parametrize(("kind", "name"), POD_TEMPLATES)
def test_pods_run_with_as_little_as_they_can(kind: str, name: str) -> None:
    spec = templates(kind)[name]["spec"]
    pod = spec["securityContext"]
    assert pod["runAsNonRoot"] is True
    assert pod["runAsUser"] == image_user()
    assert pod["seccompProfile"] == {"type": "RuntimeDefault"}
    assert spec["automountServiceAccountToken"] is False
    for container in spec["containers"]:
        security = container["securityContext"]
        assert security["allowPrivilegeEscalation"] is False
        assert security["capabilities"] == {"drop": ["ALL"]}
        assert "privileged" not in security
        assert re.fullmatch(r".+:\d[\w.]*-(cpu|cuda|xpu)", container["image"])
        for resource in ("cpu", "memory"):
            assert container["resources"]["requests"][resource]
            assert container["resources"]["limits"][resource]
        for variable in container.get("env", []):
            if variable["name"] in SECRETS:
                assert set(variable) == {"name", "valueFrom"}
                assert set(variable["valueFrom"]) == {"secretKeyRef"}


def image_user() -> int:
    """The user of the images, the same in all."""
    (user,) = {
        int(number)
        for file in (DEPLOY / "container").glob("*.Dockerfile")
        for number in re.findall(r"^USER (\d+):\d+$", file.read_text(), re.MULTILINE)
    }
    return user


@pytest.mark.parametrize("kind", KINDS)
def test_ray_nodes_answer_probes_share_memory_and_want_a_token(kind: str) -> None:
    spec = cluster_spec(kind)
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["rayVersion"] == pinned("ray")
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert [group["groupName"] for group in spec["workerGroupSpecs"]] == ["cuda", "xpu", "cpu"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        for probe in ("readinessProbe", "livenessProbe"):
            assert container[probe]["httpGet"] == {"path": "/api/healthz", "port": 52365}
        (shared,) = [m["name"] for m in container["volumeMounts"] if m["mountPath"] == "/dev/shm"]
        (volume,) = [v["emptyDir"] for v in pod["volumes"] if v["name"] == shared]
        assert volume["medium"] == "Memory"
        gibibytes = int(volume["sizeLimit"].removesuffix("Gi"))
        assert int(group["rayStartParams"]["object-store-memory"]) < gibibytes * 2**30
    for group in spec["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_the_sample_job_is_accepted_where_it_is_mounted(tmp_path: Path) -> None:
    (config,) = [d for d in documents(KINDS["RayJob"]) if d["kind"] == "ConfigMap"]
    job = manifest("RayJob")["spec"]
    head = templates("RayJob")["head"]["spec"]
    (volume,) = [v["name"] for v in head["volumes"] if "configMap" in v]
    (mount,) = [m for m in head["containers"][0]["volumeMounts"] if m["name"] == volume]
    (file,) = config["data"]
    assert job["entrypoint"] == f"python -m orchestrator run {mount['mountPath']}/{file}"
    (tmp_path / file).write_text(config["data"][file])
    spec, faults = validate(read_document(tmp_path / file))
    assert not faults
    assert spec is not None
    assert spec.output.store.startswith("s3://")
    assert job["metadata"]["quantfleet.job"] == spec.name
    assert job["metadata"]["quantfleet.store"] == f"{spec.output.store}/{spec.name}"
    assert job["backoffLimit"] > 0
    assert job["shutdownAfterJobFinishes"] is True
    replicas = {g["groupName"]: g["replicas"] for g in cluster_spec("RayJob")["workerGroupSpecs"]}
    assert replicas == {"cuda": 0, "xpu": 0, "cpu": 0} | {spec.workers.kind: spec.workers.count}


def test_the_file_for_ray_up_is_what_ray_takes() -> None:
    import jsonschema
    import ray.autoscaler
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load((DEPLOY / "ray-up.yaml").read_text())
    schema = json.loads(Path(ray.autoscaler.__file__).with_name("ray-schema.json").read_text())
    jsonschema.validate(config, schema)
    validate_config(prepare_config(config))
    assert "~/.ray/auth_token" in config["file_mounts"]
    for commands in (config["head_start_ray_commands"], config["worker_start_ray_commands"]):
        assert "RAY_AUTH_MODE=token" in commands[-1]


def test_images_have_one_python_no_latest_and_all_that_the_build_reads() -> None:
    files = sorted((DEPLOY / "container").glob("*.Dockerfile"))
    assert [f.name for f in files] == ["cpu.Dockerfile", "cuda.Dockerfile", "xpu.Dockerfile"]
    bases = {base for f in files for base in re.findall(r"^FROM (\S+)", f.read_text(), re.M)}
    assert len(bases) == 1
    assert "latest" not in bases.pop()
    assert "whl/cpu" in files[0].read_text()
    assert "whl/xpu" in files[2].read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    setuptools = project["tool"]["setuptools"]
    packages = setuptools["packages"]
    folders = {setuptools["package-dir"].get(name, name.split(".")[0]) for name in packages}
    wanted = {folder.split("/")[0] for folder in folders if "." not in folder}
    wanted = {"kernels" if name == "quantkernels" else name for name in wanted}
    kept = {
        line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] == "!"
    }
    assert kept == wanted | {"constraints.txt", "pyproject.toml", "README.md", "LICENSE"}


def pinned(package: str) -> str:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    (version,) = [line.partition("==")[2] for line in lines if line.startswith(f"{package}==")]
    return version


ALIVE = """
import sys, ray
ray.init(sys.argv[1], log_to_driver=False, logging_level="ERROR")
print(sum(node["Alive"] for node in ray.nodes()), int(ray.cluster_resources().get("CPU", 0)))
"""


def two_nodes(*arguments: str, code: int = 0, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(NODES), *arguments]
    env = os.environ | environment
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=200, env=env, check=False
    )
    assert done.returncode == code, done
    return done


def nodes_alive(cluster: dict[str, Any]) -> str:
    command = [sys.executable, "-c", ALIVE, cluster["address"]]
    environment = os.environ | cluster["environment"]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=100, env=environment, check=True
    ).stdout.strip()


def family(cluster: dict[str, Any]) -> list[psutil.Process]:
    pids = [int(pid) for node in cluster["nodes"] for pid, _ in node["processes"]]
    return [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]


def running(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.timeout(400)
def test_local_nodes_start_are_lost_and_leave_nothing_behind(tmp_path: Path) -> None:
    folder = ("--folder", str(tmp_path / "nodes"))
    cluster = json.loads(two_nodes("start", "--json", *folder).stdout)
    try:
        processes = family(cluster)
        listening = {
            connection.laddr.ip.removeprefix("::ffff:")
            for process in processes
            for connection in process.net_connections("inet")
            if connection.status == psutil.CONN_LISTEN
        }
        assert listening == {"127.0.0.1"}
        assert nodes_alive(cluster) == "3 2"
        two_nodes("start", *folder, code=2)
        two_nodes("kill", "1", *folder)
        two_nodes("kill", "1", *folder, code=2)
        lost, kept = cluster["nodes"][1], cluster["nodes"][2]
        assert not running(family({"nodes": [lost]}))
        assert running(family({"nodes": [kept]}))
    finally:
        two_nodes("stop", *folder)
    assert not running(processes)
    assert not (tmp_path / "nodes" / "nodes.json").exists()
    assert not Path(cluster["scratch"]).exists()
    two_nodes("stop", *folder, code=2)


def test_a_start_that_fails_says_why_and_ends_what_it_started(tmp_path: Path) -> None:
    folder = tmp_path / "nodes"
    done = two_nodes("start", "--folder", str(folder), code=4, RAY_AUTH_TOKEN_PATH="/no/such/file")
    assert re.match(r"two_nodes: head did not start: .*/no/such/file.*head\.log", done.stderr)
    assert len(done.stderr.splitlines()) == 1
    assert [path.name for path in folder.iterdir()] == ["head.log"]


def test_a_process_id_that_is_used_again_is_another_process() -> None:
    spec = importlib.util.spec_from_file_location("two_nodes", NODES)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    me = psutil.Process()
    assert module._known([[me.pid, me.create_time()]]) == [me]
    assert module._known([[me.pid, me.create_time() - 60]]) == []
