"""Read tensors once: what they hold, as hashes, and whether every number in them is finite.

That costs one read of the model before anything is written. In exchange nothing is begun for a
model with a NaN in it, and a resumed job knows that the model is still the same one.
"""

import hashlib
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from quantcore.errors import SourceError
from workers.sources import ModelSource

_PIECE = 1 << 20  # values that are looked at together: they stay in a core's cache


def survey(source: ModelSource, names: Iterable[str], threads: int = 1) -> dict[str, str]:
    """SHA-256 (hex) of each named tensor's bytes. Raises SourceError for NaN or infinity.

    `threads` tensors are looked at together. Of a source on this machine none is held; others are
    asked for their tensors one after the other.
    """
    pieces = getattr(source, "pieces", None)
    pool = ThreadPoolExecutor(threads)
    try:
        if pieces is None:
            return _held(source, names, pool, threads)
        # the largest first, so that none is left for the end
        ordered = sorted(names, key=lambda name: -source.tensors[name].num_bytes)
        looked = pool.map(lambda name: _look(source, name, pieces(name)), ordered)
        return dict(zip(ordered, looked, strict=True))
    finally:
        pool.shutdown(cancel_futures=True)


def _held(
    source: ModelSource, names: Iterable[str], pool: ThreadPoolExecutor, threads: int
) -> dict[str, str]:
    hashes: dict[str, str] = {}
    underway: deque[tuple[str, Future[str]]] = deque()
    for name, tensor in source.read(names):
        pieces = torch.split(tensor.contiguous().flatten(), _PIECE)
        underway.append((name, pool.submit(_look, source, name, pieces)))
        if len(underway) > threads:
            first, looked = underway.popleft()
            hashes[first] = looked.result()
    return hashes | {name: looked.result() for name, looked in underway}


def _look(source: ModelSource, name: str, pieces: Iterable[Tensor]) -> str:
    known = hashlib.sha256()
    bad = 0
    for piece in pieces:
        known.update(piece.view(torch.uint8).numpy().data)
        if piece.is_floating_point() and not _is_finite(piece):
            bad += int((~piece.isfinite()).sum().item())
    if bad:
        raise SourceError(
            f"'{name}' in {source.path} has {bad} values that are not finite "
            "(NaN or infinity): fetch the model again"
        )
    return known.hexdigest()


def _is_finite(piece: Tensor) -> bool:
    """By the extremes, which a NaN takes over; in 16 bits far quicker than value by value."""
    wide = piece.float() if piece.element_size() == 1 else piece  # float8 has no extremes
    return piece.numel() == 0 or all(bool(end.isfinite()) for end in torch.aminmax(wide))
