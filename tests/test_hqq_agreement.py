"""HQQ beside its authors' own package (0.2.8), which runs in an environment of its own.

    QUANTFLEET_HQQ_PYTHON=/path/to/its/python pytest tests/test_hqq_agreement.py

Both begin at the same float-zero grid, and under the same settings ours errs no more. Ours counts
beta in steps of the grid and keeps each group's best iteration; the peer's counts it in the units
of the weights, which are so small that its shrinkage leaves no error, and stops the whole tensor
at once. tests/benchmarks/hqq_errors.py measures both on a real model.
"""

import os

import pytest

from tests.benchmarks.hqq_errors import heavy_tailed, peers, plain, ratios

PYTHON = "QUANTFLEET_HQQ_PYTHON"

pytestmark = pytest.mark.skipif(
    PYTHON not in os.environ, reason=f"set {PYTHON} to the Python of an environment with hqq"
)


@pytest.mark.parametrize("round_zero", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_we_err_no_more_than_the_peer(bits: int, round_zero: bool) -> None:
    given = heavy_tailed(128, 512)
    theirs = peers(given, os.environ[PYTHON], bits, round_zero)
    for name, w_OI in given.items():
        objective, squares, magnitudes = ratios(w_OI, theirs[name], bits).tolist()
        assert objective < 1 and magnitudes < 1, name
        # no aim of either: where outliers are forgiven, their squares may be a little larger
        assert squares < 1.02, name
        # and the peer is no strawman: plain rounding errs more in squares than either
        assert ratios(w_OI, theirs[name], bits, plain)[1] > 1.02, name
