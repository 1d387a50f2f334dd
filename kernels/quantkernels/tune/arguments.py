"""Words of a command line that measures products, for argparse."""

from argparse import ArgumentTypeError


def count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise ArgumentTypeError(f"{text}: write a number of 1 or more")
    return int(text)


def shape(text: str) -> tuple[int, int]:
    rows, _, columns = text.partition("x")
    if not (rows.isdigit() and columns.isdigit() and int(rows) and int(columns)):
        raise ArgumentTypeError(f"{text}: write ROWSxCOLUMNS, as 28672x4096")
    return int(rows), int(columns)
