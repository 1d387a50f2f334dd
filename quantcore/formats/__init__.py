"""How quantized linears are stored, as a table: one row, one file."""

from quantcore.formats import compressed_tensors, gptq, native
from quantcore.formats.base import Format, QuantizedLinear

FORMATS: dict[str, Format] = {
    "compressed-tensors": compressed_tensors.FORMAT,
    "gptq": gptq.VERSION_1,
    "gptq_v2": gptq.VERSION_2,
    "native": native.FORMAT,
}

__all__ = ["FORMATS", "Format", "QuantizedLinear"]
