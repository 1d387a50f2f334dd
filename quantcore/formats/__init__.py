"""How quantized linears are stored, as a table: one row, one file."""

from quantcore.formats import compressed_tensors, native
from quantcore.formats.base import Format, QuantizedLinear

FORMATS: dict[str, Format] = {
    "compressed-tensors": compressed_tensors.FORMAT,
    "native": native.FORMAT,
}

__all__ = ["FORMATS", "Format", "QuantizedLinear"]
