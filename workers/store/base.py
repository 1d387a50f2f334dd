"""Where artifacts are kept: a local folder or s3://, through fsspec.

Three rules carry the rest of the design. A file that is there is whole. `put_if_absent` has one
winner, whoever asks, and is refused on a store that cannot promise it. No name leads out of the
store's root.

`put_if_absent` says whether its data is what stands there afterwards. So it may be asked twice: a
request whose answer was lost, and that was sent again, is no defeat. Who must tell himself from
another writer puts something of his own into the data.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol

from quantcore.errors import StoreError


class Store(Protocol):
    """Named files under one root. Names are relative, with forward slashes."""

    url: str

    def put(self, name: str, data: bytes) -> None: ...
    def put_file(self, name: str, local: Path) -> None: ...
    def put_if_absent(self, name: str, data: bytes) -> bool: ...
    def get(self, name: str) -> bytes: ...
    def get_file(self, name: str, local: Path) -> None: ...
    def exists(self, name: str) -> bool: ...
    def list(self, prefix: str = "") -> list[str]: ...
    def delete(self, name: str) -> None: ...
    def sweep(self, folder: str) -> None:
        """Remove what writers that were killed have left there, which `list` never names."""
        ...


@dataclass(frozen=True, slots=True)
class Entry:
    """A file of a store as it was when it was listed."""

    name: str
    num_bytes: int
    version: str  # another one once the file is another


class RangedStore(Protocol):
    """A store whose files can be read in parts."""

    url: str

    def entries(self, most: int) -> Sequence[Entry]:
        """All files; no more is listed once there are over `most`."""
        ...

    def read_range(self, entry: Entry, first: int, into: Sequence[memoryview]) -> None:
        """Fill `into`, one after the other, with a file's bytes from `first` on.

        Raises StoreError, too, for a file that is no longer what it was when it was listed.
        """
        ...


def missing_parents(folder: Path) -> list[Path]:
    """`folder` and those above it that are not there yet, outermost first."""
    missing = []
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    return missing[::-1]


def safe_name(name: str) -> str:
    """`name` itself if it stays under the root it is used in; StoreError otherwise."""
    path = PurePosixPath(name)  # differs from the name where that has an empty part, or a dot
    odd = path.is_absolute() or ".." in path.parts or not path.name or str(path) != name
    if odd or "\\" in name or "\0" in name:
        raise StoreError(f"the file name '{name}' leads out of its folder: refused")
    return name
