"""Read tensors once: what they hold, as hashes, and whether every number in them is finite."""

import hashlib
from collections.abc import Iterable

import torch

from quantcore.errors import SourceError
from workers.sources import ModelSource


def survey(source: ModelSource, names: Iterable[str]) -> dict[str, str]:
    """SHA-256 (hex) of each named tensor's bytes. Raises SourceError for NaN or infinity."""
    hashes = {}
    for name, tensor in source.read(names):
        if tensor.is_floating_point() and not tensor.isfinite().all():
            bad = int((~tensor.isfinite()).sum().item())
            raise SourceError(
                f"'{name}' in {source.path} has {bad} values that are not finite "
                "(NaN or infinity): fetch the model again"
            )
        data = tensor.contiguous().flatten().view(torch.uint8).numpy()
        hashes[name] = hashlib.sha256(data.data).hexdigest()
    return hashes
