"""Download an artifact and believe nothing: every file against the manifest, none out of place."""

import contextlib
import json
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from quantcore.errors import SpecError, StoreError
from workers.layout import EACH_KIND, MANIFEST, MODEL, hash_file
from workers.store import Store, missing_parents, safe_name


def read_manifest(store: Store) -> dict[str, Any]:
    """The manifest, its shape and its file names checked. Raises StoreError."""
    if not store.exists(MANIFEST):
        if store.exists(EACH_KIND):
            raise StoreError(
                f"{store.url} has an artifact for each kind of hardware: name one of those that "
                f"quantfleet status {store.url} tells"
            )
        raise StoreError(
            f"{store.url} has no {MANIFEST}: the job is not finished there (see quantfleet status)"
        )
    try:
        manifest: dict[str, Any] = json.loads(store.get(MANIFEST))
        entries = manifest["files"].items()
        plain = all(
            isinstance(facts["sha256"], str) and isinstance(facts["size"], int)
            for _, facts in entries
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        plain = False
    if not plain:
        raise StoreError(f"{store.url}/{MANIFEST} is not a manifest of quantfleet")
    for name in manifest["files"]:
        safe_name(name)
    return manifest


def fetch(
    store: Store, folder: Path, progress: Callable[[str, int], None] = lambda name, size: None
) -> list[Path]:
    """Put a job's files into `folder`: the model's directly, the report beside them.

    Everything is downloaded and verified in a sibling folder that is renamed at the end, so
    `folder` is there whole or not at all. Raises SpecError if it is there already.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise SpecError(f"{folder} is there already: name a new folder, or an empty one")
    manifest = read_manifest(store)
    places = {name: _place(name) for name in manifest["files"]}
    if len(set(places.values()) | {MANIFEST}) != len(places) + 1:
        raise StoreError(f"{store.url}/{MANIFEST} puts two files in one place: refused")
    partial = folder.absolute().parent / f".{folder.name}.{secrets.token_hex(4)}.partial"
    made = missing_parents(partial.parent)
    try:
        partial.mkdir(parents=True)
        for name, facts in manifest["files"].items():
            local = partial / places[name]
            local.parent.mkdir(parents=True, exist_ok=True)
            store.get_file(name, local)
            if hash_file(local) != (facts["sha256"], facts["size"]):
                raise StoreError(
                    f"{store.url}/{name} does not match its hash in the manifest: it was changed "
                    "or damaged after it was written. Nothing was kept"
                )
            progress(name, facts["size"])
        (partial / MANIFEST).write_bytes(store.get(MANIFEST))
        if folder.exists():
            folder.rmdir()
        partial.rename(folder)
    except OSError as error:
        raise StoreError(f"cannot write to {folder}: {error.strerror}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        for parent in reversed(made):  # only those that stayed empty go
            with contextlib.suppress(OSError):
                parent.rmdir()
    return [folder / place for place in places.values()]


def _place(name: str) -> str:
    return name.removeprefix(f"{MODEL}/")
