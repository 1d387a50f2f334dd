"""The inner loop of GPTQ: round column after column and hand each column's error on."""

from quantkernels.sweep.reference import AffineColumns, sweep

__all__ = ["AffineColumns", "sweep"]
