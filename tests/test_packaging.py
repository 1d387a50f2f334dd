"""What is installed is all that there is."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCES = {
    "orchestrator": "",
    "workers": "",
    "quantcore": "",
    "jobs": "",
    "quantkernels": "kernels",
}


def test_every_package_is_listed_for_the_wheel() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = set()
    for package, folder in SOURCES.items():
        top = ROOT / folder
        files = (top / package).rglob("__init__.py")
        found |= {".".join(file.parent.relative_to(top).parts) for file in files}
    assert sorted(listed) == sorted(found)
