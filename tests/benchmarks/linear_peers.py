"""Others' kernels for linear_gpu.py, each as its authors say that it is fastest.

    pip install torchao==0.18.0 gemlite==0.6.0.post2

tinygemm is torch's own int4 kernel, which torchao's int4 layouts call. gemlite searches for its
launches as each number of tokens comes (--gemlite-search max tries more of them); torchao is
compiled with mode max-autotune, without its graphs, for we capture ours. Marlin and Machete are
vLLM's (0.32). int4 and Marlin's int8 get the same symmetric codes and bfloat16 scales; the other
libraries round the weight as they do by default.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
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
    from vllm import _custom_ops as ops
    from vllm.model_executor.layers.quantization.utils import marlin_utils
    from vllm.scalar_type import scalar_types

    rows, columns = w_OI.shape
    coded = _symmetric(w_OI, bits, group)
    packed = ops.gptq_marlin_repack(_words(coded.codes_OI, bits), columns, rows, bits)
    scale_GO = marlin_utils.marlin_permute_scales(
        coded.scale_OG.t().contiguous(), columns, rows, group or -1
    )
    multiply = partial(
        _marlin_product,
        weight=packed,
        weight_scale=scale_GO,
        weight_zp=marlin_utils.marlin_make_empty(w_OI.device),
        workspace=marlin_utils.marlin_make_workspace_new(w_OI.device, 4),
        wtype=scalar_types.uint4b8 if bits == 4 else scalar_types.uint8b128,
        output_size_per_partition=rows,
        input_size_per_partition=columns,
    )
    parts = (packed, scale_GO)
    return Built(multiply=multiply, values_OI=coded.values_OI, num_bytes=num_bytes(*parts))


def _marlin_product(x_TI: Tensor, **given: Any) -> Tensor:
    from vllm.model_executor.layers.quantization.utils import marlin_utils

    y_TO: Tensor = marlin_utils.apply_gptq_marlin_linear(x_TI, **given)
    return y_TO


def _machete(w_OI: Tensor, group: int) -> Built:
    from vllm import _custom_ops as ops
    from vllm.scalar_type import scalar_types

    coded = _symmetric(w_OI, 4, group)
    columns_first = _words(coded.codes_OI, 4).t().contiguous().t()
    kind, dtype = scalar_types.uint4b8, w_OI.dtype
    packed = ops.machete_prepack_B(columns_first, dtype, kind, dtype)
    scale_GO = coded.scale_OG.t().contiguous()
    multiply = partial(
        _machete_product, b_q=packed, b_type=kind, b_group_scales=scale_GO, b_group_size=group
    )
    parts = (packed, scale_GO)
    return Built(multiply=multiply, values_OI=coded.values_OI, num_bytes=num_bytes(*parts))


def _machete_product(x_TI: Tensor, **given: Any) -> Tensor:
    from vllm import _custom_ops as ops

    y_TO: Tensor = ops.machete_mm(x_TI, **given)
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


def _vllm(operator: str) -> None:
    importlib.import_module("vllm._custom_ops")
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
