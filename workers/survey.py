"""Read tensors once: what they hold, as hashes, and whether every number in them is finite."""

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

    Tensors are read one by one, and `threads` of them looked at together.
    """
    hashes: dict[str, str] = {}
    underway: deque[tuple[str, Future[str]]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for name, tensor in source.read(names):
            underway.append((name, pool.submit(_look, source, name, tensor)))
            if len(underway) > threads:
                first, looked = underway.popleft()
                hashes[first] = looked.result()
        return hashes | {name: looked.result() for name, looked in underway}


def _look(source: ModelSource, name: str, tensor: Tensor) -> str:
    flat = tensor.contiguous().flatten()
    if tensor.is_floating_point() and not all(map(_is_finite, torch.split(flat, _PIECE))):
        bad = int((~flat.isfinite()).sum().item())
        raise SourceError(
            f"'{name}' in {source.path} has {bad} values that are not finite "
            "(NaN or infinity): fetch the model again"
        )
    return hashlib.sha256(flat.view(torch.uint8).numpy().data).hexdigest()


def _is_finite(piece: Tensor) -> bool:
    """By the extremes, which a NaN takes over; in 16 bits far quicker than value by value."""
    wide = piece.float() if piece.element_size() == 1 else piece  # float8 has no extremes
    return piece.numel() == 0 or all(bool(end.isfinite()) for end in torch.aminmax(wide))
