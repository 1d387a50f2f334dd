"""Where artifacts are kept: a local folder or s3://. See base.py for what a store promises."""

import contextlib
import secrets
from pathlib import Path

from quantcore.errors import StoreError
from workers.store.base import Entry, RangedStore, Store, missing_parents, safe_name
from workers.store.local import LocalStore
from workers.store.s3 import S3Store

__all__ = [
    "STORE_PATIENCE_S",
    "Entry",
    "LocalStore",
    "RangedStore",
    "S3Store",
    "Store",
    "missing_parents",
    "open_file",
    "open_store",
    "probe",
    "safe_name",
]

STORE_PATIENCE_S = 300.0  # once a job runs, that a store may be out of order
_PROBE = ".quantfleet-probe"


def open_store(url: str, *, conditional_writes: bool = True, patience_s: float = 0.0) -> Store:
    """The store at `url`, untouched so far: see `probe`. Raises StoreError for what is no store.

    Without `conditional_writes`, put_if_absent looks and then writes: for a store that cannot do
    better, at the caller's risk. With `patience_s`, what may pass by itself (throttling, server
    errors, broken connections) is tried again for so long.
    """
    scheme, separator, rest = url.partition("://")
    if not separator or scheme == "file":
        return LocalStore(Path(rest if separator else url))
    bucket = rest.split("/")[0]
    if scheme != "s3" or not bucket:
        raise StoreError(f"there is no store at '{scheme}://': name a folder or s3://bucket/path")
    if "@" in bucket or (":" in bucket and not bucket.startswith("arn:")):
        raise StoreError(
            "keep credentials out of the URL: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    return S3Store(url, conditional_writes=conditional_writes, patience_s=patience_s)


def open_file(place: str) -> tuple[Store, str]:
    """The store that one file stands in, and its name there. Raises StoreError for what is none."""
    scheme, separator, rest = place.partition("://")
    if not separator or scheme == "file":
        path = Path(rest if separator else place).absolute()
        return open_store(str(path.parent)), path.name
    parent, _, name = place.rpartition("/")
    if not name or parent == f"{scheme}:/":
        raise StoreError(f"there is no file at '{place}': name one, as s3://bucket/path/name")
    return open_store(parent), name


def probe(store: Store) -> None:
    """Write, read, race and delete one small file. Raises StoreError if any of it fails."""
    name = f"{_PROBE}-{secrets.token_hex(4)}"
    made = missing_parents(Path(store.url)) if isinstance(store, LocalStore) else []
    written = False  # what could not be written need not be deleted, at the price of a time-out
    try:
        written = store.put_if_absent(name, b"first")
        if not written:
            raise StoreError(f"{store.url}: a new file was said to exist already")
        second = store.put_if_absent(name, b"second")
        if second or store.get(name) != b"first":
            raise StoreError(
                f"{store.url} overwrites where it was asked not to (no conditional writes), so two "
                "drivers could spoil one job. Use a store that honours If-None-Match, or write "
                "conditional_writes: false and see to it that one driver runs at a time"
            )
    finally:
        if written:
            with contextlib.suppress(StoreError):
                store.delete(name)
        for folder in reversed(made):
            with contextlib.suppress(OSError):
                folder.rmdir()
