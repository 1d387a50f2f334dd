"""Where artifacts are kept: a local folder or s3://, through fsspec.

Three rules carry the rest of the design. A file that is there is whole. `put_if_absent` has one
winner, whoever asks, and is refused on a store that cannot promise it. No name leads out of the
store's root.
"""

import contextlib
import errno
import os
import secrets
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Protocol
from urllib.parse import urlsplit

from quantcore.errors import StoreError

_PROBE = ".quantfleet-probe"


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


def open_store(url: str) -> Store:
    """The store at `url`, untouched so far: see `probe`. Raises StoreError for what is no store."""
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
    return S3Store(url)


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
                "drivers could spoil one job. Use a store that honours If-None-Match"
            )
    finally:
        if written:
            with contextlib.suppress(StoreError):
                store.delete(name)
        for folder in reversed(made):
            with contextlib.suppress(OSError):
                folder.rmdir()


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
                return False
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
        return [name for name in names if name.startswith(prefix) and "/.new-" not in f"/{name}"]

    def delete(self, name: str) -> None:
        with self._translated(name):
            self._path(name).unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        return self._root / safe_name(name)

    @contextlib.contextmanager
    def _new_file(self, name: str) -> Iterator[Path]:
        path = self._path(name)
        temporary = path.parent / f".new-{secrets.token_hex(8)}"
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


class S3Store:
    """A prefix of a bucket. Credentials, region and endpoint come from the AWS_* environment."""

    def __init__(self, url: str) -> None:
        import s3fs
        from aiobotocore.session import AioSession
        from botocore.handlers import add_expect_header

        self.url = url.rstrip("/")
        self._root = self.url.removeprefix("s3://")
        # path-style addressing: custom endpoints rarely have a host name per bucket
        style = "path" if os.environ.get("AWS_ENDPOINT_URL") else "auto"
        session = AioSession()
        # aiohttp waits without limit for the "100 Continue" that this handler asks for
        session.unregister("before-call.s3", add_expect_header)
        self._fs = s3fs.S3FileSystem(
            session=session,
            config_kwargs={
                "s3": {"addressing_style": style},
                "retries": {"mode": "standard", "total_max_attempts": 3},
                "connect_timeout": 5,
                "read_timeout": 15,
            },
            use_listings_cache=False,
            skip_instance_cache=True,
        )
        self._fs.retries = 2  # around botocore's own: an endpoint that hangs is given up in 90 s

    def put(self, name: str, data: bytes) -> None:
        with self._translated(name, write=True):
            self._fs.pipe_file(self._path(name), data)

    def put_file(self, name: str, local: Path) -> None:
        with self._translated(name, write=True):
            self._fs.put_file(str(local), self._path(name))

    def put_if_absent(self, name: str, data: bytes) -> bool:
        with self._translated(name, write=True):
            try:
                self._fs.pipe_file(self._path(name), data, mode="create")
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno != errno.EINVAL:  # Ceph's way of saying "exists"
                    raise
                if not self._fs.exists(self._path(name)):
                    raise
                return False
            return True

    def get(self, name: str) -> bytes:
        with self._translated(name):
            data: bytes = self._fs.cat_file(self._path(name))
            return data

    def get_file(self, name: str, local: Path) -> None:
        with self._translated(name):
            self._fs.get_file(self._path(name), str(local))

    def exists(self, name: str) -> bool:
        with self._translated(name):
            try:
                return bool(self._fs.info(self._path(name))["type"] == "file")
            except FileNotFoundError:  # and nothing else: isfile would call any failure "absent"
                return False

    def list(self, prefix: str = "") -> list[str]:
        with self._translated(prefix):
            found = self._fs.find(self._root)
        names = sorted(path.removeprefix(f"{self._root}/") for path in found)
        return [name for name in names if name.startswith(prefix)]

    def delete(self, name: str) -> None:
        with self._translated(name):
            if self._fs.exists(self._path(name)):
                self._fs.rm_file(self._path(name))

    def _path(self, name: str) -> str:
        return f"{self._root}/{safe_name(name)}"

    @contextlib.contextmanager
    def _translated(self, name: str, write: bool = False) -> Iterator[None]:
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            yield
        except FileExistsError:
            raise
        except FileNotFoundError as error:
            bucket = self._root.split("/")[0]
            why = f"there is no bucket '{bucket}': create it, or name another"
            raise self._error(name, why if write else _why(error)) from None
        except (OSError, ValueError, BotoCoreError, ClientError) as error:
            raise self._error(name, _why(error)) from None

    def _error(self, name: str, why: str) -> StoreError:
        return StoreError(f"{self.url}: cannot access '{name}': {why}")


def _why(error: Exception) -> str:
    """What S3 said, in one line and without its request ids; botocore prints no secret key."""
    from botocore.exceptions import ConnectionError as Unreachable
    from botocore.exceptions import (
        HTTPClientError,
        NoCredentialsError,
        ParamValidationError,
        SSLError,
    )

    if isinstance(error, FileNotFoundError):
        return "the bucket or the file is not there"
    if isinstance(error, PermissionError | NoCredentialsError):
        return f"access denied; check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY ({error})"
    if isinstance(error, Unreachable | HTTPClientError) and not isinstance(error, SSLError):
        where = urlsplit(error.kwargs.get("endpoint_url", "")).netloc.rpartition("@")[2]
        return f"no answer from {where or 'the endpoint'}: check AWS_ENDPOINT_URL and the network"
    if isinstance(error, ParamValidationError):
        return "S3 allows no such name: check the bucket's"
    if "Invalid endpoint" in str(error):
        return "AWS_ENDPOINT_URL is no URL: write http://host:port"
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _write_through(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
