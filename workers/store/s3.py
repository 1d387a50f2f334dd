"""A prefix of a bucket as a store, through s3fs."""

import errno
import itertools
import os
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

from quantcore.errors import StoreError
from workers.store.base import Entry, safe_name

T = TypeVar("T")
_CONFLICT_ATTEMPTS = 6
_LONGEST_PAUSE_S = 20.0
_PIECE_BYTES = 1 << 18  # of an answer's body, that is copied at once
_CHANGED = "it has changed since it was first looked at: leave it alone, and start again"


class S3Store:
    """A prefix of a bucket. Credentials, region and endpoint come from the AWS_* environment."""

    def __init__(
        self, url: str, *, conditional_writes: bool = True, patience_s: float = 0.0
    ) -> None:
        import s3fs
        from aiobotocore.session import AioSession
        from botocore.handlers import add_expect_header

        self.url = url.rstrip("/")
        self._conditional_writes = conditional_writes
        self.patience_s = patience_s
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
        path = self._path(name)
        self._do(name, lambda: self._fs.pipe_file(path, data), write=True)

    def put_file(self, name: str, local: Path) -> None:
        path = self._path(name)
        self._do(name, lambda: self._fs.put_file(str(local), path), write=True)

    def put_if_absent(self, name: str, data: bytes) -> bool:
        path = self._path(name)
        won = self._do(name, lambda: self._created(path, data), write=True)
        return won or self.get(name) == data

    def get(self, name: str) -> bytes:
        path = self._path(name)
        data: bytes = self._do(name, lambda: self._fs.cat_file(path))
        return data

    def get_file(self, name: str, local: Path) -> None:
        path = self._path(name)
        self._do(name, lambda: self._fs.get_file(path, str(local)))

    def exists(self, name: str) -> bool:
        path = self._path(name)
        return self._do(name, lambda: self._is_file(path))

    def list(self, prefix: str = "") -> list[str]:
        found = self._do(prefix, lambda: self._fs.find(self._root))
        names = sorted(path.removeprefix(f"{self._root}/") for path in found)
        return [name for name in names if name.startswith(prefix)]

    def sweep(self, folder: str) -> None:
        """Nothing: what was not uploaded to its end is no file. A bucket's own rule ends it."""
        safe_name(folder)

    def entries(self, most: int) -> Sequence[Entry]:
        bucket, key, _ = self._fs.split_path(self._root)
        prefix = f"{key}/" if key else ""
        asked = {"Bucket": bucket, "Prefix": prefix}
        found = []
        while True:
            page = self._do("/", lambda: self._fs.call_s3("list_objects_v2", **asked))
            found += [
                Entry(item["Key"].removeprefix(prefix), item["Size"], item["ETag"])
                for item in page.get("Contents", ())
            ]
            if len(found) > most or not page.get("IsTruncated"):
                return found
            asked["ContinuationToken"] = page["NextContinuationToken"]

    def read_range(self, entry: Entry, first: int, into: Sequence[memoryview]) -> None:
        from fsspec.asyn import sync

        path = self._path(entry.name)
        self._do(entry.name, lambda: sync(self._fs.loop, self._fill, path, entry, first, into))

    async def _fill(self, path: str, entry: Entry, first: int, into: Sequence[memoryview]) -> None:
        """One request. If-Match is how S3 is asked for a file as it was, and for no other."""
        bucket, key, _ = self._fs.split_path(path)
        size = sum(part.nbytes for part in into)
        asked = {"Range": f"bytes={first}-{first + size - 1}", "IfMatch": entry.version}
        answer = await self._fs._call_s3("get_object", Bucket=bucket, Key=key, **asked)
        async with answer["Body"] as body:
            if answer["ETag"].strip('"') != entry.version.strip('"'):
                raise self._error(entry.name, _CHANGED)
            if answer["ContentLength"] != size:
                why = f"{answer['ContentLength']} bytes came where {size} were asked for"
                raise self._error(entry.name, why)
            for part in into:
                at = 0
                while at < part.nbytes:
                    data = await body.read(min(_PIECE_BYTES, part.nbytes - at))
                    if not data:
                        raise ConnectionError("the answer ended early")
                    part[at : at + len(data)] = data
                    at += len(data)

    def delete(self, name: str) -> None:
        path = self._path(name)
        self._do(name, lambda: self._fs.rm_file(path) if self._fs.exists(path) else None)

    def _path(self, name: str) -> str:
        return f"{self._root}/{safe_name(name)}"

    def _is_file(self, path: str) -> bool:
        try:
            return bool(self._fs.info(path)["type"] == "file")
        except FileNotFoundError:  # and nothing else: isfile would call any failure "absent"
            return False

    def _created(self, path: str, data: bytes) -> bool:
        if not self._conditional_writes:
            if self._is_file(path):
                return False
            self._fs.pipe_file(path, data)
            return True
        try:
            self._fs.pipe_file(path, data, mode="create")
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno == errno.EINVAL and self._fs.exists(path):
                return False  # Ceph's way of saying "exists"
            raise
        return True

    def _do(self, name: str, action: Callable[[], T], write: bool = False) -> T:
        """The action's result. What may pass is tried again, longer and longer apart."""
        from aiohttp import ClientError as BrokenOff
        from botocore.exceptions import BotoCoreError, ClientError

        end = time.monotonic() + self.patience_s
        for attempt in itertools.count():
            try:
                return action()
            except FileNotFoundError as error:
                bucket = self._root.split("/")[0]
                missing = f"there is no bucket '{bucket}': create it, or name another"
                raise self._error(name, missing if write else _why(error)) from None
            except (OSError, ValueError, BotoCoreError, ClientError, BrokenOff) as error:
                pause = min(0.2 * 2**attempt, _LONGEST_PAUSE_S)
                again = _may_pass(error) and time.monotonic() + pause < end
                if not again and not (_is_conflict(error) and attempt < _CONFLICT_ATTEMPTS):
                    changed = _answer(error)[0] == 412  # of what was asked for with If-Match
                    raise self._error(name, _CHANGED if changed else _why(error)) from None
            time.sleep(pause * random.uniform(0.5, 1))  # noqa: S311 - not all at once
        raise AssertionError

    def _error(self, name: str, why: str) -> StoreError:
        return StoreError(f"{self.url}: cannot access '{name}': {why}")


def _may_pass(error: Exception) -> bool:
    """Whether the same request may succeed later: throttling, server errors, broken connections."""
    from aiohttp import ClientError as BrokenOff
    from botocore.exceptions import HTTPClientError, SSLError
    from botocore.parsers import ResponseParserError

    if isinstance(error, SSLError):
        return False
    if isinstance(error, HTTPClientError | ResponseParserError | BrokenOff):
        return True
    if isinstance(error, TimeoutError | ConnectionError):
        return True
    status, code = _answer(error)
    return status >= 500 or status == 429 or code in {"SlowDown", "RequestTimeout"}


def _is_conflict(error: Exception) -> bool:
    """AWS answers 409 while another conditional write of the same name is under way: ask again."""
    return _answer(error)[1] == "ConditionalRequestConflict"


def _answer(error: Exception) -> tuple[int, str]:
    """HTTP status and error code of what S3 answered, if it answered at all."""
    response = getattr(error, "response", None) or getattr(error.__cause__, "response", None) or {}
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return status, response.get("Error", {}).get("Code", "")


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
