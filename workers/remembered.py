"""What a user's machine remembers from one command to the next, so as not to work it out again.

    $XDG_CACHE_HOME/quantfleet/<kind>-<start of the SHA-256 of all that it hangs on>
    the SHA-256 of what follows, a line break, what follows

A key is made of contents and versions, never of a path or a time of change: what is remembered is
what would be worked out. So nothing hangs on it but time. What is damaged is named, ignored and
made anew; what cannot be written is named, too. The oldest in use go once there is too much.
"""

import contextlib
import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError

from quantcore.errors import DAMAGE, StoreError, why_damaged
from workers.kind import version_of
from workers.layout import dump
from workers.store import LocalStore

T = TypeVar("T")

_MOST_BYTES = 1 << 28  # of all that is remembered
_MOST_ENTRY_BYTES = 1 << 26
_DIGEST_CHARACTERS = 64


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/quantfleet: a user's place for what can be made anew."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "quantfleet"


@dataclass(slots=True)
class Memory:
    folder: Path = field(default_factory=cache_folder)
    warnings: list[str] = field(default_factory=list)
    _writable: bool = True

    def recall(self, name: str, read: Callable[[bytes], T]) -> T | None:
        """What `read` makes of an entry that is there and whole."""
        path = self.folder / name
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            self.warnings.append(f"{path} is not read: {error.strerror or error}")
            return None
        try:
            found = read(_checked(data))
        except (*DAMAGE, SafetensorError) as error:
            self.warnings.append(f"{path} is ignored: damaged ({why_damaged(error)}): made anew")
            return None
        with contextlib.suppress(OSError):
            os.utime(path)  # in use: others go first
        return found

    def keep(self, name: str, data: bytes) -> None:
        if len(data) > _MOST_ENTRY_BYTES or not self._writable:
            return
        head = hashlib.sha256(data).hexdigest().encode() + b"\n"
        try:
            LocalStore(self.folder).put(name, head + data)
            _tidy(self.folder)
        except (StoreError, OSError) as error:
            self._writable = False
            self.warnings.append(f"nothing is remembered in XDG_CACHE_HOME: {error}")


def entry_name(kind: str, hangs_on: Mapping[str, Any]) -> str:
    return f"{kind}-{hashlib.sha256(dump(dict(hangs_on))).hexdigest()[:32]}"


def versions_of(*packages: str) -> dict[str, str]:
    """Of those that work it out, and of quantfleet."""
    return {package: version_of(package) for package in ("quantfleet", *packages)}


def _checked(data: bytes) -> bytes:
    told, content = data[:_DIGEST_CHARACTERS], data[_DIGEST_CHARACTERS + 1 :]
    if hashlib.sha256(content).hexdigest().encode() != told:
        raise ValueError("not what was written")
    return content


def _tidy(folder: Path) -> None:
    """Others may do the same meanwhile."""
    found = []
    for path in folder.iterdir():
        with contextlib.suppress(OSError):
            facts = path.stat()
            found.append((facts.st_mtime_ns, facts.st_size, path))
    total = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if total <= _MOST_BYTES:
            break
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        total -= size
