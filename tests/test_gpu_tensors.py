"""Quantized tensors on a CUDA device, by torch's own kernels. Run with: pytest -m gpu"""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from quantcore.errors import QuantizationError
from quantcore.inductor import recommended_inductor_settings
from quantcore.quantize import quantize_
from quantcore.schemes import Scheme
from quantcore.tensors import (
    Layout,
    QuantizedTensor,
    accelerator,
    flatten_state,
    relayout,
    unflatten_state,
    w8a8,
    weight_only,
)
from quantcore.tensors.kernels import Multiply, kernel_for, reference
from tests.quantized import FORMS, expected, linear, relative, tokens

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]

MOST = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
DTYPES = pytest.mark.parametrize("dtype", list(MOST), ids=str)
TILED_GROUPS = (32, 64, 128, 256)


@pytest.fixture(autouse=True)
def exact_float32() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def served(weight: QuantizedTensor, x: Tensor, bias_O: Tensor | None = None) -> Tensor:
    bias_O = None if bias_O is None else bias_O.cuda()
    y: Tensor = nn.functional.linear(x.cuda(), weight, bias_O)
    return y.cpu()


def on_gpu(scheme: Scheme, rows: int, width: int, dtype: torch.dtype) -> QuantizedTensor:
    weight: QuantizedTensor = QuantizedTensor.of(linear(scheme, rows, width), dtype).cuda()
    assert weight.device.type == "cuda"
    return weight


@DTYPES
@pytest.mark.parametrize("scheme", FORMS, ids=Scheme.label)
def test_a_linear_is_within_rounding_of_float64(scheme: Scheme, dtype: torch.dtype) -> None:
    ours = linear(scheme, 48, 96)
    weight, bias_O = on_gpu(scheme, 48, 96, dtype), tokens(48, dtype=dtype)
    for shape in ((96,), (1, 96), (16, 96), (17, 96), (2, 33, 96), (0, 96)):
        x = tokens(*shape, dtype=dtype) if 0 not in shape else torch.zeros(shape, dtype=dtype)
        y = served(weight, x, bias_O)
        assert y.dtype == dtype
        assert y.shape == (*shape[:-1], 48)
        assert relative(y, expected(x, ours, bias_O)) < MOST[dtype], shape


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (17, 33), (24, 40), (8, 16)])
@pytest.mark.parametrize(
    "scheme", [form for form in FORMS if form.group_size is None], ids=Scheme.label
)
def test_weights_of_odd_shapes(scheme: Scheme, rows: int, width: int) -> None:
    ours = linear(scheme, rows, width)
    for count in (1, 20):
        x_TI = tokens(count, width, dtype=torch.bfloat16)
        y_TO = served(on_gpu(scheme, rows, width, torch.bfloat16), x_TI)
        assert relative(y_TO, expected(x_TI, ours, None)) < 2 * MOST[torch.bfloat16]


@pytest.mark.parametrize("zero_point", ["none", "float"])
@pytest.mark.parametrize("group_size", TILED_GROUPS)
def test_tiles_multiply_as_float64_does(group_size: int, zero_point: str) -> None:
    scheme = Scheme(name="int4", group_size=group_size, zero_point=zero_point)  # type: ignore[arg-type]
    for rows, width in ((8, 256), (48, 512), (1024, 1280)):
        ours = linear(scheme, rows, width)
        weight = relayout(on_gpu(scheme, rows, width, torch.bfloat16), "tensor_core_tiled")
        assert torch.equal(weight.read()[0].cpu(), ours.codes_OI)
        for count in (1, 7, 64):
            x_TI = tokens(count, width, dtype=torch.bfloat16)
            assert kernel_for(x_TI.cuda(), weight) is accelerator.int4
            assert relative(served(weight, x_TI), expected(x_TI, ours, None)) < 1e-2


@pytest.mark.parametrize("width", [32, 64, 96, 128, 160, 4096])
def test_our_tiles_are_torchs_own(width: int) -> None:
    scheme = Scheme(name="int4", group_size=32)
    weight = on_gpu(scheme, 40, width, torch.bfloat16)
    tiles = relayout(weight, "tensor_core_tiled").codes
    nibbles_OI = (weight.read()[0] + 8).to(torch.uint8)
    pairs = (nibbles_OI[:, ::2] << 4 | nibbles_OI[:, 1::2]).contiguous()
    theirs = torch.ops.aten._convert_weight_to_int4pack(pairs, tiles.shape[3] * 2)
    assert torch.equal(tiles, theirs)


@pytest.mark.parametrize(
    ("name", "layout", "dtype", "run"),
    [
        ("int8_dynamic", Layout.PLAIN, torch.bfloat16, w8a8.multiply),
        ("int8_static", Layout.PLAIN, torch.float32, w8a8.multiply),
        ("float8_dynamic", Layout.PLAIN, torch.bfloat16, w8a8.multiply),
        ("float8_static", Layout.PLAIN, torch.bfloat16, w8a8.multiply),
        ("float8_dynamic", Layout.PLAIN, torch.float32, reference),
        ("int8_dynamic_int4", Layout.TRITON_TILED, torch.bfloat16, weight_only.multiply),
        ("int8_dynamic_int4", Layout.TRITON_TILED, torch.float16, weight_only.multiply),
        ("int8", Layout.PLAIN, torch.bfloat16, reference),
        ("float8", Layout.PLAIN, torch.bfloat16, reference),
    ],
)
def test_shapes_and_dtypes_choose_the_kernel(
    name: str, layout: Layout, dtype: torch.dtype, run: Multiply
) -> None:
    weight = relayout(on_gpu(Scheme(name=name), 64, 64, dtype), layout)
    assert kernel_for(torch.zeros(2, 64, dtype=dtype, device="cuda"), weight) is run
    odd = relayout(on_gpu(Scheme(name=name), 63, 63, dtype), layout)
    assert kernel_for(torch.zeros(2, 63, dtype=dtype, device="cuda"), odd) is run


@DTYPES
@pytest.mark.parametrize("name", ["int8_dynamic", "int8_static"])
@pytest.mark.skipif(not torch.backends.cusparselt.is_available(), reason="no cuSPARSELt")
def test_sparse_codes_are_multiplied_sparse(name: str, dtype: torch.dtype) -> None:
    scheme = Scheme(name=name)
    ours = linear(scheme, 64, 128, sparse=True)
    plain: QuantizedTensor = QuantizedTensor.of(ours, dtype).cuda()
    weight = relayout(plain, Layout.SPARSE_24_CUDA)
    assert torch.equal(weight.read()[0].cpu(), ours.codes_OI)
    assert weight.num_bytes() < 0.7 * plain.num_bytes()
    for count in (1, 16, 33, 200):
        x_TI = tokens(count, 128, dtype=dtype)
        assert kernel_for(x_TI.cuda(), weight) is accelerator.sparse_by_int8
        assert relative(served(weight, x_TI), expected(x_TI, ours, None)) < MOST[dtype]
    with pytest.raises(QuantizationError, match="write relayout"):
        weight.cpu()


@pytest.mark.parametrize("scheme", FORMS, ids=Scheme.label)
def test_slices_and_moves_keep_the_values(scheme: Scheme) -> None:
    weight = on_gpu(scheme, 48, 96, torch.bfloat16)
    dense = weight.dequantize()
    assert torch.equal(weight[3:20].dequantize(), dense[3:20])
    assert torch.equal(weight[:, 32:64].dequantize(), dense[:, 32:64])
    back: QuantizedTensor = weight.cpu()
    assert torch.equal(back.dequantize(), dense.cpu())
    x_TI = tokens(20, 32, dtype=torch.bfloat16).cuda()
    part = nn.functional.linear(x_TI, weight[:, 32:64])
    whole = nn.functional.linear(x_TI, weight[:, 32:64].clone())
    assert torch.equal(part, whole)


def test_tiles_go_to_a_file_and_back(tmp_path: Path) -> None:
    scheme = Scheme(name="int4", group_size=64, zero_point="float")
    weight = relayout(on_gpu(scheme, 48, 128, torch.bfloat16), "tensor_core_tiled")
    stored, facts = flatten_state({"weight": weight})
    assert json.loads(facts)["quantized"]["weight"]["layout"] == "tensor_core_tiled"
    save_file(stored, tmp_path / "state.safetensors")
    state = unflatten_state(load_file(tmp_path / "state.safetensors", device="cuda"), facts)
    x_TI = tokens(5, 128, dtype=torch.bfloat16)
    again = state["weight"]
    assert isinstance(again, QuantizedTensor)
    assert torch.equal(served(again, x_TI), served(weight, x_TI))
    # a CPU reads the same tiles
    assert (
        relative(
            nn.functional.linear(x_TI, again.cpu()), expected(x_TI, linear(scheme, 48, 128), None)
        )
        < 1e-2
    )


@pytest.mark.parametrize(
    ("scheme", "layout"),
    [
        (Scheme(name="int4", group_size=32), "tensor_core_tiled"),
        (Scheme(name="int4", group_size=32), "plain"),
        (Scheme(name="int4", group_size=32), "triton_tiled"),
        (Scheme(name="int8"), "triton_tiled"),
        (Scheme(name="int8_dynamic_int4", group_size=32), "triton_tiled"),
        (Scheme(name="int8"), "plain"),
        (Scheme(name="int8_dynamic"), "plain"),
        (Scheme(name="float8_dynamic"), "plain"),
        (Scheme(name="float8"), "plain"),
    ],
    ids=str,
)
@pytest.mark.parametrize("recommended", [False, True])
def test_a_compiled_model_is_the_eager_one(scheme: Scheme, layout: str, recommended: bool) -> None:
    import torch._inductor.config as config

    saved = config.save_config()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 256), nn.GELU(), nn.Linear(256, 128)).cuda().bfloat16()
    quantize_(model, scheme, layout=layout, inductor_settings=False)
    try:
        if recommended:
            recommended_inductor_settings(again=True)
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True)
        with torch.no_grad():
            for count in (1, 40):
                x_TI = tokens(count, 128, dtype=torch.bfloat16).cuda()
                wanted = model(x_TI)
                assert (compiled(x_TI) - wanted).norm() < 2e-2 * wanted.norm()
    finally:
        config.load_config(saved)


@pytest.mark.skipif(
    torch.__version__.startswith("2.11."),
    reason="torch 2.11 dies of a segmentation fault as it loads a package for CUDA",
)
def test_aot_inductor_packages_it(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(128, 64), nn.ReLU()).cuda().bfloat16().eval()
    quantize_(model, "int4", group_size=32, layout="tensor_core_tiled", inductor_settings=False)
    x_TI = tokens(5, 128, dtype=torch.bfloat16).cuda()
    with torch.no_grad():
        program = torch.export.export(model, (x_TI,))
        file = str(tmp_path / "model.pt2")
        torch._inductor.aoti_compile_and_package(program, package_path=file)
        packaged, wanted = torch._inductor.aoti_load_package(file), model(x_TI)
        assert (packaged(x_TI) - wanted).norm() <= 2e-2 * wanted.norm()
