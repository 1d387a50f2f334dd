"""A folder as a store."""

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from quantcore.errors import StoreError
from workers.store.base import safe_name

_UNFINISHED = ".new-"  # how names of files begin that are being written


class LocalStore:
    """A folder. Files appear by rename or hard link, so that none is ever seen half-written."""

    def __init__(self, root: Path) -> None:
        self._root = root.absolute()
        self.url = str(self._root)

    def put(self, name: str, data: bytes) -> None:
        with self._new_file(name) as temporary:
            _write_through(temporary, data)
            temporary.replace(self._path(name))

    def put_file(self, name: str, local: Path) -> None:
        import shutil

        with self._new_file(name) as temporary:
            shutil.copyfile(local, temporary)
            _sync(temporary)
            temporary.replace(self._path(name))

    def put_if_absent(self, name: str, data: bytes) -> bool:
        with self._new_file(name) as temporary:
            _write_through(temporary, data)
            try:
                self._path(name).hardlink_to(temporary)
            except FileExistsError:
                return self.get(name) == data
            return True

    def get(self, name: str) -> bytes:
        with self._translated(name):
            return self._path(name).read_bytes()

    def get_file(self, name: str, local: Path) -> None:
        import shutil

        with self._translated(name):
            shutil.copyfile(self._path(name), local)

    def exists(self, name: str) -> bool:
        return self._path(name).is_file()

    def list(self, prefix: str = "") -> list[str]:
        files = (path for path in self._root.rglob("*") if path.is_file())
        names = sorted(path.relative_to(self._root).as_posix() for path in files)
        return [
            name
            for name in names
            if name.startswith(prefix) and f"/{_UNFINISHED}" not in f"/{name}"
        ]

    def delete(self, name: str) -> None:
        with self._translated(name):
            self._path(name).unlink(missing_ok=True)

    def sweep(self, folder: str) -> None:
        with self._translated(folder):
            for unfinished in self._path(folder).rglob(f"{_UNFINISHED}*"):
                unfinished.unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        return self._root / safe_name(name)

    @contextlib.contextmanager
    def _new_file(self, name: str) -> Iterator[Path]:
        path = self._path(name)
        temporary = path.parent / f"{_UNFINISHED}{secrets.token_hex(8)}"
        with self._translated(name, "; name a folder that can be written"):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                yield temporary
            finally:
                temporary.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _translated(self, name: str, instead: str = "") -> Iterator[None]:
        try:
            yield
        except OSError as error:
            why = f"{error.strerror or error}{instead}"
            raise StoreError(f"{self.url}: cannot access '{name}': {why}") from None


def _write_through(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
