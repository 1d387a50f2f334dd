"""Others' kernels for linear_gpu.py, each as its authors say that it is fastest.

    pip install torchao==0.18.0 gemlite==0.6.0.post2

tinygemm is torch's own int4 kernel, which torchao's int4 layouts call. gemlite searches for its
launches as each number of tokens comes (--gemlite-search max tries more of them); torchao is
compiled with mode max-autotune, without its graphs, for we capture ours. Marlin and Machete are
vLLM's, called by its operators alone (0.26.0 is the last one for torch 2.11). int4 and Marlin's
int8 get the same symmetric codes and bfloat16 scales; the other libraries round the weight as they
do by default.
"""

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.benchmarks.linear_kernels import Built, Kernel, compiled, num_bytes

MODE = "max-autotune-no-cudagraphs"


def peers(device: str, gemlite_search: str = "fast") -> tuple[list[Kernel], dict[str, str]]:
    """The kernels that can run here, and why the others cannot, by library."""
    kernels, missing = [], {}
    for library in _LIBRARIES:
        rows = [row for row in library.kernels if device in row.devices]
        if not rows:
            missing[library.name] = f"not for a {device}"
            continue
        try:
            library.opened()
        except Exception as error:
            missing[library.name] = f"{type(error).__name__}: {error}".splitlines()[0]
            continue
        kernels += rows
    if gemlite_search != "fast" and "gemlite" not in missing:
        importlib.import_module("gemlite").set_autotune(gemlite_search)
    return kernels, missing


@dataclass(frozen=True, slots=True)
class _Codes:
    codes_OI: Tensor  # int8, centred
    scale_OG: Tensor
    values_OI: Tensor


def _symmetric(w_OI: Tensor, bits: int, group: int | None) -> _Codes:
    """q = round(w / s) with s = max|w| / (2^(bits-1) - 1), as the dtype of w has it."""
    rows, columns = w_OI.shape
    w_OGI = w_OI.float().reshape(rows, -1, group or columns)
    highest = 2 ** (bits - 1) - 1
    scale_OG = (w_OGI.abs().amax(-1) / highest).to(w_OI.dtype)
    scale_OG1 = scale_OG.float()[:, :, None]
    codes_OGI = (w_OGI / scale_OG1).round().clamp(-highest - 1, highest)
    values_OI = (codes_OGI * scale_OG1).reshape(rows, columns)
    return _Codes(codes_OGI.reshape(rows, columns).to(torch.int8), scale_OG, values_OI)


def _tinygemm(w_OI: Tensor, group: int) -> Built:
    coded = _symmetric(w_OI, 4, group)
    unsigned_OI = coded.codes_OI.int() + 8
    scale_GO = coded.scale_OG.t()
    pairs_GO2 = torch.stack([scale_GO, torch.zeros_like(scale_GO)], -1).contiguous()
    aten = torch.ops.aten
    if w_OI.device.type == "cpu":
        packed = aten._convert_weight_to_int4pack_for_cpu(unsigned_OI, 1)
    else:
        nibbles = (unsigned_OI[:, ::2] << 4 | unsigned_OI[:, 1::2]).to(torch.uint8)
        packed = aten._convert_weight_to_int4pack(nibbles, 8)
    return Built(
        multiply=partial(_tinygemm_product, packed=packed, group=group, pairs_GO2=pairs_GO2),
        values_OI=coded.values_OI,
        num_bytes=num_bytes(packed, pairs_GO2),
    )


def _tinygemm_product(x_TI: Tensor, packed: Tensor, group: int, pairs_GO2: Tensor) -> Tensor:
    cpu = x_TI.device.type == "cpu"
    aten = torch.ops.aten
    multiply = aten._weight_int4pack_mm_for_cpu if cpu else aten._weight_int4pack_mm
    y_TO: Tensor = multiply(x_TI, packed, group, pairs_GO2)
    return y_TO


def _gemlite_int4(w_OI: Tensor, group: int) -> Built:
    from gemlite.helper import A16W4_HQQ_INT

    coded = _symmetric(w_OI, 4, group)
    module = A16W4_HQQ_INT(device=str(w_OI.device), dtype=w_OI.dtype).from_weights(
        (coded.codes_OI + 8).to(torch.uint8),
        coded.scale_OG,
        torch.full_like(coded.scale_OG, 8),
    )
    parts = (module.W_q, module.scales, module.zeros)
    return Built(multiply=module, values_OI=coded.values_OI, num_bytes=num_bytes(*parts))


def _gemlite(w_OI: Tensor, helper: str) -> Built:
    made = getattr(importlib.import_module("gemlite.helper"), helper)
    module = made(device=str(w_OI.device), dtype=w_OI.dtype).from_weights(w_OI.clone())
    values_OI = module.W_q.t().float() * module.scales.reshape(-1, 1).float()
    parts = (module.W_q, module.scales)
    return Built(multiply=module, values_OI=values_OI, num_bytes=num_bytes(*parts))


def _torchao(w_OI: Tensor, config: Callable[[Any], Any]) -> Built:
    from torchao import quantization

    rows, columns = w_OI.shape
    module = nn.Linear(columns, rows, bias=False, device="meta")
    module.weight = nn.Parameter(w_OI.clone(), requires_grad=False)
    quantization.quantize_(module, config(quantization))
    weight: Any = module.weight
    scale = weight.scale.float()
    return Built(
        multiply=partial(compiled, weight=weight, mode=MODE),
        values_OI=weight.qdata.float() * scale,
        num_bytes=num_bytes(weight.qdata, scale),
    )


def _marlin(w_OI: Tensor, bits: int, group: int | None) -> Built:
    rows, columns = w_OI.shape
    coded = _symmetric(w_OI, bits, group)
    words = _words(coded.codes_OI, bits)
    unordered = torch.empty(0, dtype=torch.int32, device=w_OI.device)
    packed = torch.ops._C.gptq_marlin_repack(words, unordered, columns, rows, bits, False)
    # Of 64 scales, or of 32 where a row has one, in the order in which its threads hold outputs.
    scale_GO = coded.scale_OG.t()
    shape = (-1, 8, 8, 1) if group else (-1, 4, 4, 2)
    scale_GO = scale_GO.reshape(shape).transpose(1, 2).reshape(scale_GO.shape).contiguous()
    workers = torch.cuda.get_device_properties(w_OI.device).multi_processor_count
    multiply = partial(
        _marlin_product,
        packed=packed,
        scale_GO=scale_GO,
        workspace=torch.zeros(4 * workers, dtype=torch.int32, device=w_OI.device),
        kind=_UINT4B8 if bits == 4 else _UINT8B128,
        rows=rows,
    )
    parts = (packed, scale_GO)
    return Built(multiply=multiply, values_OI=coded.values_OI, num_bytes=num_bytes(*parts))


def _marlin_product(
    x_TI: Tensor, packed: Tensor, scale_GO: Tensor, workspace: Tensor, kind: int, rows: int
) -> Tensor:
    tokens, columns = x_TI.shape
    unused = [None] * 5  # scales of inputs and of all, zero points, groups of inputs, their order
    y_TO: Tensor = torch.ops._C.marlin_gemm(
        x_TI, None, packed, None, scale_GO, *unused, workspace, kind, tokens, rows, columns,
        is_k_full=True, use_atomic_add=False, use_fp32_reduce=True, is_zp_float=False,
    )  # fmt: skip
    return y_TO


def _machete(w_OI: Tensor, group: int) -> Built:
    coded = _symmetric(w_OI, 4, group)
    columns_first = _words(coded.codes_OI, 4).t().contiguous().t()
    packed = torch.ops._C.machete_prepack_B(columns_first, w_OI.dtype, _UINT4B8, w_OI.dtype)
    scale_GO = coded.scale_OG.t().contiguous()
    multiply = partial(_machete_product, packed=packed, scale_GO=scale_GO, group=group)
    parts = (packed, scale_GO)
    return Built(multiply=multiply, values_OI=coded.values_OI, num_bytes=num_bytes(*parts))


def _machete_product(x_TI: Tensor, packed: Tensor, scale_GO: Tensor, group: int) -> Tensor:
    y_TO: Tensor = torch.ops._C.machete_mm(
        x_TI, packed, _UINT4B8, None, scale_GO, None, group, None, None, None
    )
    return y_TO


def _words(codes_OI: Tensor, bits: int) -> Tensor:
    """GPTQ's order: int32 (I / codes in a word, O), the first input in the lowest bits."""
    rows, columns = codes_OI.shape
    each = 32 // bits
    codes_OWE = (codes_OI.long() + 2 ** (bits - 1)).reshape(rows, columns // each, each)
    words_OW = torch.zeros_like(codes_OWE[:, :, 0])
    for place in range(each):
        words_OW |= codes_OWE[:, :, place] << (bits * place)
    signed_OW = torch.where(words_OW >= 1 << 31, words_OW - (1 << 32), words_OW)
    return signed_OW.to(torch.int32).t().contiguous()


@dataclass(frozen=True, slots=True)
class _Library:
    name: str
    opened: Callable[[], object]  # raises what says why it is missing
    kernels: list[Kernel]


_UINT4B8, _UINT8B128 = 1 << 50 | 8 << 17 | 4 << 8, 1 << 50 | 128 << 17 | 8 << 8  # vllm.scalar_type


def _vllm(operator: str) -> None:
    """Loads vLLM's operators alone: its package imports an engine, and all that one needs."""
    found = importlib.util.find_spec("vllm")
    if found is None or not found.submodule_search_locations:
        raise ImportError("no vllm is installed")
    if not hasattr(torch.ops._C, operator):
        for file in Path(found.submodule_search_locations[0]).glob("_C*.abi3.so"):
            torch.ops.load_library(str(file))
    if not hasattr(torch.ops._C, operator):
        raise ImportError(f"this build of vLLM has no {operator}")


_INT8, _ROW, _TENSOR = "int8, per token", "float8, per token", "float8, per tensor"
_gemlite_row = partial(Kernel, by="gemlite")
_torchao_row = partial(Kernel, by="torchao")


def _config(name: str, granularity: str | None = None) -> Callable[[Tensor], Built]:
    def made(quantization: Any) -> Any:
        settings = {"granularity": getattr(quantization, granularity)()} if granularity else {}
        return getattr(quantization, name)(**settings)

    return partial(_torchao, config=made)


_FLOAT8_CONFIG = "Float8DynamicActivationFloat8WeightConfig"

_LIBRARIES = [
    _Library(
        "tinygemm",
        lambda: torch.ops.aten._weight_int4pack_mm,
        [
            Kernel(
                by="tinygemm",
                scheme=f"int4 g{group}",
                build=partial(_tinygemm, group=group),
                devices=("cuda", "cpu"),
            )
            for group in (128, 64)
        ],
    ),
    _Library(
        "gemlite",
        lambda: importlib.import_module("gemlite.helper"),
        [
            _gemlite_row(scheme="int4 g128", build=partial(_gemlite_int4, group=128)),
            _gemlite_row(scheme="int4 g64", build=partial(_gemlite_int4, group=64)),
            _gemlite_row(scheme="int8", build=partial(_gemlite, helper="A16W8_INT8")),
            _gemlite_row(scheme="float8", build=partial(_gemlite, helper="A16W8_FP8")),
            _gemlite_row(
                scheme="int8 dynamic",
                build=partial(_gemlite, helper="A8W8_INT8_dynamic"),
                served=_INT8,
            ),
            _gemlite_row(
                scheme="float8 dynamic row",
                build=partial(_gemlite, helper="A8W8_FP8_dynamic"),
                served=_ROW,
            ),
        ],
    ),
    _Library(
        "torchao",
        lambda: importlib.import_module("torchao.quantization"),
        [
            _torchao_row(scheme="int8", build=_config("Int8WeightOnlyConfig")),
            _torchao_row(scheme="float8", build=_config("Float8WeightOnlyConfig")),
            _torchao_row(
                scheme="int8 dynamic",
                build=_config("Int8DynamicActivationInt8WeightConfig"),
                served=_INT8,
            ),
            _torchao_row(
                scheme="float8 dynamic row",
                build=_config(_FLOAT8_CONFIG, "PerRow"),
                served=_ROW,
            ),
            _torchao_row(
                scheme="float8 dynamic tensor",
                build=_config(_FLOAT8_CONFIG, "PerTensor"),
                served=_TENSOR,
            ),
        ],
    ),
    _Library(
        "marlin",
        lambda: _vllm("marlin_gemm"),
        [
            Kernel(by="marlin", scheme="int4 g128", build=partial(_marlin, bits=4, group=128)),
            Kernel(by="marlin", scheme="int4 g64", build=partial(_marlin, bits=4, group=64)),
            Kernel(by="marlin", scheme="int8", build=partial(_marlin, bits=8, group=None)),
        ],
    ),
    _Library(
        "machete",
        lambda: _vllm("machete_mm"),
        [Kernel(by="machete", scheme="int4 g128", build=partial(_machete, group=128))],
    ),
]
