"""Benchmarks' options for how kernels of ours follow each other (quantkernels/dependent.py).

--independent         each starts when the one before has ended
--ahead-bytes BYTES   what a product's programs fetch of their weight before that; 0 for nothing
"""

import argparse
import os


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--independent",
        action="store_true",
        help="no kernel of ours is sent out before the one before it has ended",
    )
    parser.add_argument(
        "--ahead-bytes", type=int, help="of its weight, that a program of a product fetches before"
    )


def obey(options: argparse.Namespace) -> str:
    """Before the first launch; how it is told in a table's head."""
    if options.device != "cuda":
        return ""
    from quantkernels import dependent

    if options.independent:
        os.environ[dependent.VARIABLE] = "0"  # for processes that compile as well
    if options.ahead_bytes is not None:
        dependent.AHEAD_BYTES = options.ahead_bytes
    dependent.asked.cache_clear()
    if not dependent.asked():
        return ", independent launches"
    return f", dependent launches with {dependent.AHEAD_BYTES} bytes ahead"
