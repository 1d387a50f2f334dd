"""scipy's two solvers, with what they print by themselves kept apart.

HiGHS prints a line of its own where an answer is not whole at first, whatever it is told, and from
C, where a redirected `sys.stdout` is not heard of. So while a solver runs, standard output goes to
standard error: the whole process's, and two threads take turns.
"""

import ctypes
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from scipy import optimize

_PRINTING = threading.Lock()


def linprog(*args: Any, **options: Any) -> Any:
    with _printing_apart():
        return optimize.linprog(*args, **options)


def milp(*args: Any, **options: Any) -> Any:
    with _printing_apart():
        return optimize.milp(*args, **options)


@contextmanager
def _printing_apart() -> Iterator[None]:
    with _PRINTING:
        flush = ctypes.CDLL(None).fflush  # C keeps lines back where they go to a pipe or a file
        flush(None)
        try:
            kept = os.dup(1)
        except OSError:  # nothing is open there
            yield
            return
        try:
            with suppress(OSError):
                os.dup2(2, 1)
            yield
        finally:
            flush(None)
            os.dup2(kept, 1)
            os.close(kept)
