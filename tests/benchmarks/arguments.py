"""What benchmarks are told on the command line, refused before anything is timed."""

import argparse
from pathlib import Path

import torch
from quantkernels.tune.arguments import count, shape

__all__ = ["count", "device", "folder", "new_file", "shape"]


def new_file(text: str) -> Path:
    path = Path(text)
    if not path.parent.is_dir() or path.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: write a file's name in a folder that is there")
    return path


def folder(text: str) -> Path:
    path = Path(text)
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is no folder")
    return path


def device(text: str) -> str:
    if text not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"{text}: write cpu or cuda")
    if text == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError("there is no CUDA GPU here: write cpu, to try the command")
    return text
