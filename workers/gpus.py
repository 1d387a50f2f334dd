"""The GPUs of this machine, as a process sees them that works on one and may read others."""

import os

import torch

_VISIBLE = "CUDA_VISIBLE_DEVICES"


def see_others(device: str) -> None:
    """See the machine's other GPUs behind the one that was given, which stays the first.

    Before CUDA is begun in this process; a GPU that is named otherwise than by its number is left
    alone, and so are parts of GPUs.
    """
    own = os.environ.get(_VISIBLE, "")
    if not device.startswith("cuda") or not own.isdecimal() or _begun():
        return
    del os.environ[_VISIBLE]
    others = [str(number) for number in range(torch.cuda.device_count()) if str(number) != own]
    os.environ[_VISIBLE] = ",".join([own, *others])


def _begun() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def visible_gpus(device: str) -> list[str]:
    """By names that are theirs alone, in the order of their numbers here."""
    if not device.startswith("cuda"):
        return []
    count = torch.cuda.device_count()
    return [str(torch.cuda.get_device_properties(number).uuid) for number in range(count)]


def own_gpu(device: str) -> str:
    return next(iter(visible_gpus(device)), "")
