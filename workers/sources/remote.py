"""A Hugging Face folder in object storage, read a tensor at a time and never as a whole.

Headers and tensors are read by ranges, tensors that lie side by side in common requests, several
of which are under way at once, each tensor straight into its own memory. The small files that
transformers wants come into a private temporary folder. Every request names the version that was
listed when the model was opened (its ETag), and the plan has a digest of all of these: what changes
meanwhile is an error, and no two workers mix versions.
"""

import contextlib
import hashlib
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantcore.errors import SourceError, StoreError
from workers.sources.base import TensorInfo
from workers.sources.checkpoint import (
    CONFIG,
    INDEX,
    SINGLE,
    Expected,
    config_json,
    copy_companions,
    first_line,
    indexed_files,
    is_companion,
    joined,
    load_config,
    load_tokenizer,
)
from workers.sources.header import LENGTH_BYTES, StoredTensor, header_bytes, parse_header
from workers.store import Entry, RangedStore, safe_name

REQUEST_BYTES = 8 << 20  # at most: what is asked for again when a connection breaks
_REQUESTS = 8  # at once
_WAITING = 2 * _REQUESTS  # requests under way, or answered and not yet handed on
AHEAD_BYTES = _WAITING * REQUEST_BYTES  # that a reader holds beside the tensor it is at
_START_BYTES = 1 << 17  # of a file: nearly every header is shorter
_MOST_FILES = 10_000
_MOST_CONFIG_BYTES = 1 << 24
_MOST_SMALL_BYTES = 1 << 28  # of an index; of all companions


@dataclass(slots=True)
class _Request:
    file: Entry
    first: int
    num_bytes: int = 0
    # of each tensor in it: name, where in the tensor, how many bytes
    parts: list[tuple[str, int, int]] = field(default_factory=list)


class RemoteFolder:
    remote = True

    def __init__(self, store: RangedStore) -> None:
        self.path = store.url
        self._store = store
        self._scratch = tempfile.TemporaryDirectory(prefix="quantfleet-")
        self._local = Path(self._scratch.name)
        self._complete = False  # the companions are there, too
        with _told():
            entries = store.entries(_MOST_FILES)
        if len(entries) > _MOST_FILES:
            raise SourceError(
                f"{self.path} holds over {_MOST_FILES} files: name the folder of one model"
            )
        self._entries = {e.name: e for e in entries if not e.name.endswith("/")}
        if CONFIG not in self._entries:
            raise SourceError(f"{self.path} has no {CONFIG}: it is not a Hugging Face model folder")
        self._fetch_small(self._entries[CONFIG], _MOST_CONFIG_BYTES)
        expected = self._weight_files()
        with ThreadPoolExecutor(_REQUESTS) as pool:
            headers = list(pool.map(self._header, expected))
        stored, self._file_of = joined(zip(expected, headers, strict=True), expected)
        self._stored = stored
        self.tensors: Mapping[str, TensorInfo] = {name: s.info for name, s in stored.items()}
        read = sorted({CONFIG, *expected} | ({INDEX} & self._entries.keys()))
        self.version = hashlib.sha256(repr([self._entries[n] for n in read]).encode()).hexdigest()

    @cached_property
    def config(self) -> Any:
        return load_config(self._local, self.path)

    def made_of(self) -> str:
        """By the versions of the files, as they were listed: none need be fetched for it."""
        told = [self._entries[CONFIG], *sorted(self._companions(), key=lambda entry: entry.name)]
        return hashlib.sha256(repr([self.path, told]).encode()).hexdigest()

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """In the order in which they lie. A caller that is slow finds the next ones there."""
        buffers: dict[str, Tensor] = {}
        underway: deque[tuple[_Request, Future[None]]] = deque()
        pool = ThreadPoolExecutor(_REQUESTS, thread_name_prefix="ranges")
        try:
            for request in self._requests(names):
                underway.append(
                    (request, pool.submit(self._fill, request, self._room(request, buffers)))
                )
                if len(underway) >= _WAITING:
                    yield from self._arrived(*underway.popleft(), buffers)
            while underway:
                yield from self._arrived(*underway.popleft(), buffers)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def config_json(self) -> dict[str, Any]:
        return config_json(self._local)

    def write_companions(self, folder: Path) -> list[str]:
        self._fetch_companions()
        return copy_companions(self._local, folder)

    def companion_bytes(self) -> int:
        return sum(entry.num_bytes for entry in self._companions())

    def tokenizer(self) -> Any:
        self._fetch_companions()
        return load_tokenizer(self._local, self.path)

    def _weight_files(self) -> Expected:
        index = self._entries.get(INDEX)
        if index is None:
            if SINGLE not in self._entries:
                raise SourceError(f"{self.path} has neither {SINGLE} nor {INDEX}")
            return {SINGLE: None}
        where = f"{self.path}/{INDEX}"
        try:
            text = self._bytes(index, 0, self._bounded(index, _MOST_SMALL_BYTES)).decode("utf-8")
        except UnicodeDecodeError as error:
            raise SourceError(f"{where} is not a safetensors index: {first_line(error)}") from None
        files = indexed_files(text, where)
        for file in files:
            if file not in self._entries:
                raise SourceError(f"{INDEX} names {file}, which is not in {self.path}")
        return files

    def _header(self, file: str) -> dict[str, StoredTensor]:
        entry, where = self._entries[file], f"{self.path}/{file}"
        size = entry.num_bytes
        start = self._bytes(entry, 0, min(size, _START_BYTES))
        try:
            stop = LENGTH_BYTES + header_bytes(start, size)
            if stop > len(start):
                start += self._bytes(entry, len(start), stop - len(start))
            return parse_header(start[LENGTH_BYTES:stop], size, where)
        except ValueError as error:
            raise SourceError(
                f"{where} is not a whole safetensors file: {first_line(error)}. Upload it again"
            ) from None

    def _requests(self, names: Iterable[str]) -> Iterator[_Request]:
        """Neighbours in one request, as far as it is long; longer tensors in several."""
        order = sorted((self._file_of[name], self._stored[name].first, name) for name in set(names))
        request: _Request | None = None
        for file, first, name in order:
            num_bytes, at = self._stored[name].info.num_bytes, 0
            while True:
                if request is None or not self._continues(request, file, first + at):
                    if request is not None:
                        yield request
                    request = _Request(self._entries[file], first + at)
                size = min(num_bytes - at, REQUEST_BYTES - request.num_bytes)
                request.parts.append((name, at, size))
                request.num_bytes += size
                at += size
                if at == num_bytes:
                    break
        if request is not None:
            yield request

    @staticmethod
    def _continues(request: _Request, file: str, at: int) -> bool:
        meets = request.file.name == file and request.first + request.num_bytes == at
        return meets and request.num_bytes < REQUEST_BYTES

    def _room(self, request: _Request, buffers: dict[str, Tensor]) -> list[memoryview]:
        """Where an answer goes: into each tensor's own memory."""
        views = []
        for name, start, size in request.parts:
            if start == 0:
                num_bytes = self._stored[name].info.num_bytes
                buffers[name] = torch.empty(num_bytes, dtype=torch.uint8)
            views.append(buffers[name].numpy().data[start : start + size])
        return views

    def _fill(self, request: _Request, views: list[memoryview]) -> None:
        if request.num_bytes:
            with _told():
                self._store.read_range(request.file, request.first, views)

    def _arrived(
        self, request: _Request, answer: Future[None], buffers: dict[str, Tensor]
    ) -> Iterator[tuple[str, Tensor]]:
        answer.result()
        for name, start, size in request.parts:
            info = self._stored[name].info
            if start + size == info.num_bytes:
                yield name, buffers.pop(name).view(info.dtype).view(info.shape)

    def _bytes(self, entry: Entry, first: int, num_bytes: int) -> bytes:
        data = bytearray(num_bytes)
        if num_bytes:
            with _told():
                self._store.read_range(entry, first, [memoryview(data)])
        return bytes(data)

    def _companions(self) -> list[Entry]:
        return [entry for name, entry in self._entries.items() if is_companion(name)]

    def _fetch_companions(self) -> None:
        if self._complete:
            return
        if self.companion_bytes() > _MOST_SMALL_BYTES:
            largest = max(self._companions(), key=lambda entry: entry.num_bytes)
            raise SourceError(
                f"{self.path} has over {_MOST_SMALL_BYTES >> 20} MiB of files beside its weights, "
                f"most of it {largest.name}: keep there what belongs to the model alone"
            )
        for entry in self._companions():
            self._fetch_small(entry, _MOST_SMALL_BYTES)
        self._complete = True

    def _fetch_small(self, entry: Entry, most: int) -> None:
        """Into the temporary folder. What leads out of it is refused."""
        with _told():
            local = self._local / safe_name(entry.name)
        try:
            local.parent.mkdir(parents=True, exist_ok=True)
            local.write_bytes(self._bytes(entry, 0, self._bounded(entry, most)))
        except OSError as error:
            why = error.strerror or error
            raise SourceError(f"{self.path}: cannot keep a copy of {entry.name}: {why}") from None

    def _bounded(self, entry: Entry, most: int) -> int:
        if entry.num_bytes > most:
            raise SourceError(
                f"{self.path}/{entry.name} has {entry.num_bytes >> 20} MiB, over {most >> 20}: "
                "it is no file of a model's"
            )
        return entry.num_bytes


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """What the store says, about a model."""
    try:
        yield
    except StoreError as error:
        raise SourceError(str(error)) from None
