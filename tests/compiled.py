"""Compiles the Triton kernels for a Hopper GPU, which need not be there, and prints how it went.

In a process of its own: where tests run without a GPU, Triton interprets.
"""

import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from quantkernels.weight_only.tiles import BITS, Codes
from quantkernels.weight_only.unpack import excess, unpacking

POINTERS = {
    "codes_ptr": "*i16",
    "scale_ptr": "*fp32",
    "zero_ptr": "*fp32",
    "parts_ptr": "*fp32",
    "arrivals_ptr": "*i32",
}
Case = tuple[str, Codes, int, str, bool, dict[str, Any]]
# kernel, codes, size of a group, zero point, PTX or plain operations, other constants
CASES: list[Case] = [
    ("_linear", "int4", 128, "none", True, {}),
    ("_linear", "int4", 128, "affine", True, {"EARLY": True, "TOKENS": 128, "num_warps": 8}),
    ("_linear", "int4", 64, "offset", True, {"EARLY": True, "SPLIT": 3, "BIAS": True}),
    ("_linear", "int8", 0, "none", True, {"ROWS": 64, "TOKENS": 8, "num_warps": 2}),
    ("_linear", "float8", 0, "none", True, {"EVEN": False}),
    ("_linear", "int4", 32, "affine", False, {"SPLIT": 2}),
    ("_linear", "float8", 0, "none", False, {}),
    ("_dense", "int4", 64, "offset", True, {}),
    ("_dense", "int8", 0, "none", False, {}),
]


def compiled(
    name: str, kind: Codes, group: int, zero: str, ptx: bool, other: dict[str, Any]
) -> dict[str, int]:
    import triton
    from quantkernels.weight_only import fused
    from triton.backends.compiler import GPUTarget

    dtype = torch.bfloat16
    scaled = bool(other.get("EARLY")) or (name == "_dense" and group > 0)
    constants = {
        "x_I": 1, "BIAS": False, "EVEN": True, "EARLY": False, "ROWS": 128, "TOKENS": 16,
        "SPLIT": 1, "TURN": 128, "STAGES": 3, "BITS": BITS[kind], "FLOAT8": kind == "float8",
        "GROUP": group, "ZERO": zero, "EXCESS": excess(kind, dtype),
        "PTX": unpacking(kind, dtype, zero, scaled=scaled) if ptx else (),
    } | other  # fmt: skip
    warps = constants.pop("num_warps", 4)
    kernel = getattr(fused, name)
    constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
    signature = {
        argument: "constexpr"
        if argument in constants
        else POINTERS.get(argument, "*bf16")
        if argument.endswith("_ptr")
        else "i32"
        for argument in kernel.arg_names
    }
    aligned = {
        (at,): [["tt.divisibility", 16]]
        for at, argument in enumerate(kernel.arg_names)
        if argument.endswith("_ptr") or argument in ("rows", "columns", "x_T")
    }
    source = triton.compiler.ASTSource(kernel, signature, constants, aligned)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    cubin = made.asm["cubin"]
    return {"bytes": len(cubin), "spilled": spilled(cubin, Path(triton.__path__[0]))}


def spilled(cubin: bytes, triton: Path) -> int:
    """Bytes of a thread's stack, where registers go that are too many."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = triton / "backends" / "nvidia" / "bin" / "cuobjdump"
        told = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        )
    return max(int(found) for found in re.findall(r"STACK:(\d+)", told.stdout))


if __name__ == "__main__":
    for case in CASES:
        try:
            told: dict[str, Any] = compiled(*case)
        except Exception as error:
            told = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(told), flush=True)
