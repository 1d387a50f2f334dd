"""Bytes as people read them. Commands print them before they import torch, which takes seconds."""

MIB = 2**20
GIB = 2**30


def gib(num_bytes: int) -> str:
    unit, size = ("GiB", GIB) if num_bytes >= GIB // 10 else ("MiB", MIB)
    return f"{num_bytes / size:.1f}{unit}"
