"""Compiles the Triton kernels for a GPU, mostly Hopper, which need not be there; tells how it went.

In a process of its own: where tests run without a GPU, Triton interprets.
"""

import json
import re
import subprocess
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from quantkernels.grids import GridName
from quantkernels.launches import BITS, Codes
from quantkernels.weight_only.unpack import excess, unpacking

POINTERS = {
    "codes_ptr": "*i16",
    "parts_ptr": "*fp32",
    "arrivals_ptr": "*i32",
}
LATER = {"LATER": True, "AHEAD": 2}
MANY = {"ROWS": 256, "TOKENS": 128, "STAGES": 4, "WARPS": 8, "num_warps": 8}
HALF = {"ROWS": 128, "WARPS": 4, "num_warps": 4}
Case = tuple[str, Codes, int, str, bool, dict[str, Any]]
# kernel, codes, size of a group, zero point, PTX or plain operations, other constants, and the type
# of scales and zero points, if not bfloat16
CASES: list[Case] = [
    ("product", "int4", 128, "none", True, {}),
    ("product", "int4", 128, "none", True, {"scales": "*fp32"}),
    ("product", "int4", 64, "none", True, {"TURN": 256, "scales": "*fp16"}),
    ("product", "int4", 128, "affine", True, {"EARLY": True, "TOKENS": 128, "num_warps": 8}),
    ("product", "int4", 64, "offset", True, {"EARLY": True, "SPLIT": 3, "BIAS": True}),
    ("product", "int8", 0, "none", True, {"TOKENS": 64, "num_warps": 8, "ROWS": 256}),
    ("product", "int8", 0, "none", True, {"ROWS": 64, "TOKENS": 8, "num_warps": 2}),
    ("product", "float8", 0, "none", True, {"EVEN": False}),
    ("product", "int4", 32, "affine", False, {"SPLIT": 2}),
    ("product", "float8", 0, "none", False, {}),
    ("overlapped", "int4", 128, "none", True, MANY),
    ("overlapped", "int4", 32, "affine", True, MANY | {"TOKENS": 64, "scales": "*fp32"}),
    ("overlapped", "int4", 64, "affine", True, MANY | {"BIAS": True}),
    ("overlapped", "int4", 32, "none", True, MANY | {"TOKENS": 256, "ROWS": 128}),
    ("overlapped", "int8", 0, "none", True, MANY | {"STAGES": 3}),
    ("overlapped", "int4", 128, "none", True, MANY | {"TOKENS": 256, "ROWS": 128} | LATER),
    ("overlapped", "int8", 0, "none", True, MANY | HALF | {"SHARED": True, "UNIT": 64}),
    ("overlapped", "int4", 64, "offset", True, MANY | HALF | {"TOKENS": 32} | LATER),
    ("overlapped", "float8", 0, "none", True, MANY | {"TOKENS": 64, "STAGES": 3}),
    ("w8a8", "int8", 0, "none", True, {"TOKENS": 64, "num_warps": 8, "BIAS": True}),
    ("w8a8", "float8", 0, "none", True, {"EVEN": False, "SPLIT": 2}),
    ("product", "int4", 128, "none", False, {"TOKENS": 64, "num_warps": 8, "capability": 80}),
    ("product", "int8", 0, "none", False, {"ROWS": 64, "capability": 80}),
    ("w8a8", "int8", 0, "none", True, {"capability": 80}),
    ("product", "int4", 128, "none", True, {"TURN": 256, "SPLIT": 8} | LATER),
    ("product", "int4", 64, "affine", True, {"ROWS": 256, "TOKENS": 64, "num_warps": 8} | LATER),
    ("product", "int4", 32, "offset", True, {"EARLY": True, "scales": "*fp32"} | LATER),
    ("product", "int8", 0, "none", True, {"ROWS": 32, "TOKENS": 8, "num_warps": 1} | LATER),
    ("product", "float8", 0, "none", True, LATER),
    ("w8a8", "int8", 0, "none", True, {"ROWS": 64, "TOKENS": 8, "SPLIT": 4} | LATER),
    ("w8a8", "float8", 0, "none", True, {"EVEN": False, "BIAS": True} | LATER),
    ("w8a8_overlapped", "int8", 0, "none", True, MANY | LATER),
    ("w8a8_overlapped", "int8", 0, "none", True, MANY | {"ROWS": 128, "TOKENS": 256, "BIAS": True}),
    ("w8a8_overlapped", "int8", 0, "none", True, MANY | HALF | LATER | {"SHARED": True}),
    ("_dense", "int4", 64, "offset", True, {}),
    ("_dense", "int8", 0, "none", False, {}),
]

# grid, its ends, symmetric, rows by columns, a norm or what else is asked for
INT8: tuple[GridName, tuple[int, int]] = ("affine", (-128, 127))
FLOAT8: tuple[GridName, tuple[int, int]] = ("float8", (-448, 448))
ROUNDINGS: list[tuple[GridName, tuple[int, int], bool, tuple[int, int], str]] = [
    (*INT8, True, (1, 14_336), "none"),
    (*INT8, False, (40, 4096), "none"),
    (*INT8, True, (2048, 4096), "none"),
    (*FLOAT8, True, (1, 14_336), "none"),
    (*FLOAT8, True, (2048, 18_944), "none"),
    (*FLOAT8, True, (16, 4096), "scale"),
    (*INT8, False, (1, 14_336), "read back"),
    (*INT8, False, (2048, 4096), "read back"),
    (*INT8, False, (300, 40_000), "read back"),
]
# kernels of forward/, with what they are compiled for
FORWARD: list[tuple[str, dict[str, Any]]] = [
    ("_rms_norm", {"stride_I": 1, "stride_weight": 1, "OFFSET": False, "BLOCK": 4096}),
    ("_rotated", {"x_D": 1, "cos_D": 1, "sin_D": 1, "out_D": 1, "HEADS": 32, "HALF": 64}),
    ("_silu_product", {"gate_I": 1, "up_I": 1, "BLOCK": 2048}),
]
# query heads to a head of keys, values of a head, places, pairs of a sequence and a head of keys
ATTENTIONS: list[tuple[int, int, int, int, str]] = [
    (4, 128, 230, 8, "kept"),
    (4, 128, 230, 128, "kept"),
    (4, 128, 8192, 8, "kept"),
    (4, 128, 230, 8, "none"),
    (4, 128, 230, 8, "added"),
    (16, 256, 2000, 4, "kept"),
]


def compiled(
    name: str, kind: Codes, group: int, zero: str, ptx: bool, other: dict[str, Any]
) -> dict[str, Any]:
    import triton
    from quantkernels.w8a8 import fused as w8a8
    from quantkernels.w8a8 import overlapped as w8a8_overlapped
    from quantkernels.weight_only import fused, overlapped, product
    from triton.experimental.gluon._runtime import GluonASTSource

    dtype = torch.bfloat16
    scaled = bool(other.get("EARLY")) or (name in ("_dense", "overlapped") and group > 0)
    constants = {
        "x_I": 1, "BIAS": False, "EVEN": True, "EARLY": False, "ROWS": 128, "TOKENS": 16,
        "SPLIT": 1, "SHARED": False, "TURN": 128, "STAGES": 3, "UNIT": 128, "BITS": BITS[kind],
        "FLOAT8": kind == "float8",
        "GROUP": group, "ZERO": zero, "EXCESS": excess(kind, dtype),
        "PTX": unpacking(kind, dtype, zero, scaled=scaled) if ptx else (),
        "LATER": False, "AHEAD": 0,
    }  # fmt: skip
    scales = other.get("scales", "*bf16")
    pointers = POINTERS | {"scale_ptr": scales, "zero_ptr": scales}
    if name.startswith("w8a8"):
        codes = "*fp8e4nv" if kind == "float8" else "*i8"
        pointers |= {
            "x_ptr": codes, "codes_ptr": codes, "x_scale_ptr": "*fp32",
            "parts_ptr": "*fp32" if kind == "float8" else "*i32",
        }  # fmt: skip
        constants |= {"BY_TOKEN": True}
    constants |= other
    options = {"num_warps": other.get("num_warps", 4)}
    if name == "overlapped":
        options["maxnreg"] = overlapped.REGISTERS[constants["WARPS"]]
        pointers |= {
            "x_desc": f"tensordesc<bf16[{constants['TOKENS']}, 64],{overlapped.INPUTS!r}>",
            "codes_desc": f"tensordesc<i16[128, 32],{overlapped.CODES!r}>",
        }
    if name == "w8a8_overlapped":
        options["maxnreg"] = overlapped.REGISTERS[constants["WARPS"]]
        pointers |= {
            of: f"tensordesc<i8[{constants[size]}, 128],{w8a8_overlapped.BYTES!r}>"
            for of, size in (("x_desc", "TOKENS"), ("codes_desc", "ROWS"))
        }
    kernels = {
        "product": product.product, "overlapped": overlapped.overlapped, "_dense": fused._dense,
        "w8a8": w8a8._linear, "w8a8_overlapped": w8a8_overlapped.overlapped,
    }  # fmt: skip
    kernel = kernels[name]
    constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
    signature = {
        argument: "constexpr"
        if argument in constants
        else pointers.get(argument, "*bf16")
        if argument.endswith(("_ptr", "_desc"))
        else "i32"
        for argument in kernel.arg_names
    }
    aligned = {
        (at,): [["tt.divisibility", 16]]
        for at, argument in enumerate(kernel.arg_names)
        if argument.endswith("_ptr") or argument in ("rows", "columns", "x_T", "codes_O")
    }
    source_of = GluonASTSource if name.endswith("overlapped") else triton.compiler.ASTSource
    source = source_of(kernel, signature, constants, aligned)
    return _assembled(source, options, other.get("capability", 90))


def compiled_rounding(
    grid: GridName, ends: tuple[int, int], symmetric: bool, shape: tuple[int, int], asked: str
) -> dict[str, Any]:
    """Of so many rows of so many values, which lie one after another."""
    import triton
    from quantkernels.rounding import fused

    rows, width = shape
    norm = "none" if asked == "read back" else asked
    sizes = fused.sizes(rows, width, norm=norm != "none")
    constants = {
        "stride_I": 1, "given_ptr": None, "parts_ptr": None, "GRID": grid, "QMIN": ends[0],
        "QMAX": ends[1], "SYMMETRIC": symmetric, "NORM": norm, "OWN": True, "PARTS": 1,
        "FUSED": True, "PTX": sizes.piece >= 128 * sizes.warps,
        "HELD": sizes.held, "BLOCK": sizes.block, "SPANS": sizes.spans,
        "PIECE": sizes.piece, "LATER": True, "EARLY": rows == 1,
    }  # fmt: skip
    if norm == "none":
        constants |= {"weight_ptr": None, "kept_ptr": None}
    pointers = {"codes_ptr": "*i8", "scale_ptr": "*fp32", "zero_ptr": "*fp32"}
    if asked == "read back":
        constants |= {"scale_ptr": None, "zero_ptr": None}
        pointers = {}
    signature = {
        argument: "constexpr"
        if argument in constants
        else pointers.get(argument, "*bf16")
        if argument.endswith("_ptr")
        else "fp32"
        if argument == "eps"
        else "i32"
        for argument in fused._round_row.arg_names
    }
    aligned = {
        (at,): [["tt.divisibility", 16]]
        for at, argument in enumerate(fused._round_row.arg_names)
        if argument not in constants
        and (argument.endswith("_ptr") or argument in ("width", "stride_T"))
    }
    source = triton.compiler.ASTSource(fused._round_row, signature, constants, aligned)
    return _assembled(source, {"num_warps": sizes.warps, "enable_fp_fusion": False}, 90)


def compiled_forward(name: str, constants: dict[str, Any]) -> dict[str, Any]:
    import triton
    from quantkernels.forward import fused

    kernel = getattr(fused, name)
    constants = constants | {"LATER": True, "EARLY": True}
    signature = {
        argument: "constexpr"
        if argument in constants
        else "*bf16"
        if argument.endswith("_ptr")
        else "fp32"
        if argument == "eps"
        else "i32"
        for argument in kernel.arg_names
    }
    source = triton.compiler.ASTSource(kernel, signature, constants)
    return _assembled(source, {"num_warps": 8}, 90)


def compiled_attention(
    share: int, values: int, length: int, pairs: int, mask: str
) -> dict[str, Any]:
    import triton
    from quantkernels.forward import attention

    cut = attention.spans_of(pairs, length)
    sizes = attention.sizes(share, values, length, cut, 2)
    options = {name: sizes.pop(name) for name in ("num_warps", "num_stages")}
    constants = sizes | {
        "q_D": 1, "k_D": 1, "v_D": 1, "mask_L": 1, "MASK": mask, "SPLIT": cut[0] > 1,
        "LATER": True, "EARLY": False,
    }  # fmt: skip
    pointers = {"parts_ptr": "*fp32", "arrivals_ptr": "*i32"}
    if mask == "kept":
        pointers["mask_ptr"] = "*u8"
    names = attention._attended.arg_names
    signature = {
        name: "constexpr"
        if name in constants
        else pointers.get(name, "*bf16")
        if name.endswith("_ptr")
        else "fp32"
        if name == "scale"
        else "i32"
        for name in names
    }
    even = ("q_B", "q_H", "k_B", "k_G", "k_L", "v_B", "v_G", "v_L", "values", "span")
    aligned = {
        (at,): [["tt.divisibility", 16]]
        for at, name in enumerate(names)
        if name.endswith("_ptr") or name in even
    }
    source = triton.compiler.ASTSource(attention._attended, signature, constants, aligned)
    return _assembled(source, options, 90)


def _assembled(source: Any, options: dict[str, Any], capability: int) -> dict[str, Any]:
    import triton
    from triton.backends.compiler import GPUTarget

    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    tools = Path(triton.__path__[0]) / "backends" / "nvidia" / "bin"
    cubin = made.asm["cubin"]
    sass = _told([tools / "nvdisasm"], cubin)
    return {
        "bytes": len(cubin),
        "spilled": spilled(cubin, tools),
        "serialized": serialized(sass),
        "narrow": "ld.global.b16" in made.asm["ptx"],
        "dependent": "griddepcontrol.wait" in made.asm["ptx"],
        "hasty": [*hasty(made.asm["ptx"]), *hasty_assembled(sass)],
    }


def spilled(cubin: bytes, tools: Path) -> int:
    """Bytes of a thread's stack, where registers go that are too many."""
    told = _told([tools / "cuobjdump", "-res-usage"], cubin)
    return max(int(found) for found in re.findall(r"STACK:(\d+)", told))


def serialized(sass: str) -> bool:
    """Whether the assembler has every instruction of a matrix unit waited for, which it may."""
    products = sum(sass.count(of) for of in ("HGMMA.", "IGMMA."))
    return 0 < products <= sass.count("WARPGROUP.DEPBAR")


def hasty(ptx: str) -> list[str]:
    """Of a dependent kernel what touches memory, or leaves the path, before it waits."""
    if "griddepcontrol" not in ptx:
        return []
    begin, waits, _ = ptx[ptx.index("{\n") :].partition("griddepcontrol.wait")
    crowded = "griddepcontrol.launch_dependents" in begin
    told = [] if waits and not crowded else ["it does not wait, or releases what cannot run yet"]
    if "setmaxnreg" in ptx:  # warps part ways at once: those that copy, and those that multiply
        every = ptx.count("griddepcontrol.wait") == 2
        told += [] if every else ["not all of its warps wait"]
        begin = "\n".join(re.findall(r".*\.global\b.*", begin))
    lines = re.sub("//.*", "", begin).replace("{", "\n").replace(";", "\n").splitlines()
    harmless = re.compile(r"ld\.param|prefetch\.global")
    touching = re.compile(r"\b(ld|st|atom|red|cp|bra|ret|exit|bar|barrier|mbarrier|prefetch)\b")
    return told + [line for line in lines if touching.search(line) and not harmless.search(line)]


def hasty_assembled(sass: str) -> list[str]:
    """The same of what the assembler made of it, which moves instructions."""
    if "PREEXIT" not in sass and "ACQBULK" not in sass:
        return []
    begin, waits, _ = sass.partition("ACQBULK")
    touching = re.compile(r"\s(LD|LDG|LDGSTS|LDS|ST|STG|STS|ATOM|ATOMG|RED|UBLKCP|UTMALDG|EXIT)\b")
    found = [line.strip() for line in begin.splitlines() if touching.search(line)]
    if "USETMAXREG" in sass:  # each warp reads, of shared memory, what it is to do, and may end
        found = [line for line in found if not re.search(r"\s(LDS|EXIT)\b", line)]
        waits = waits and sass.count("ACQBULK") == 2
    return found if waits else ["it does not wait"]


def _told(command: list[str | Path], cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([*command, file.name], capture_output=True, text=True, check=True)
    return done.stdout


if __name__ == "__main__":
    calls = [*(partial(compiled, *of) for of in CASES)]
    calls += [partial(compiled_rounding, *of) for of in ROUNDINGS]
    calls += [partial(compiled_forward, *of) for of in FORWARD]
    calls += [partial(compiled_attention, *of) for of in ATTENTIONS]
    for call in calls:
        try:
            told: dict[str, Any] = call()
        except Exception as error:
            told = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(told), flush=True)
