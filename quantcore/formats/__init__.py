"""How quantized linears are stored, as a table: one row, one file."""

from quantcore.formats import compressed_tensors
from quantcore.formats.base import Format, QuantizedLinear

FORMATS: dict[str, Format] = {"compressed-tensors": compressed_tensors.FORMAT}

__all__ = ["FORMATS", "Format", "QuantizedLinear"]
