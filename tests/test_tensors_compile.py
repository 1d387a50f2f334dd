"""Quantized linears through torch.compile, torch.export and AOTInductor."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from quantcore import inductor
from quantcore.inductor import SETTINGS, recommended_inductor_settings
from quantcore.schemes import Scheme
from quantcore.tensors import Layout
from tests.quantized import laid, linear, tokens

INT4 = Scheme(name="int4", group_size=32)
CASES = [
    pytest.param(scheme, layout, id=f"{scheme.label()} {layout}")
    for scheme, layout in (
        (INT4, Layout.PLAIN),
        (INT4, Layout.INT4_CPU),
        (INT4, Layout.TRITON_TILED),
        (Scheme(name="int4", group_size=32, zero_point="float"), Layout.TENSOR_CORE_TILED),
        (Scheme(name="int4", group_size=32, zero_point="int"), Layout.PLAIN),
        (Scheme(name="int8"), Layout.PLAIN),
        (Scheme(name="int8", group_size=32), Layout.PLAIN),
        (Scheme(name="int8_dynamic"), Layout.PLAIN),
        (Scheme(name="int8_dynamic"), Layout.SPARSE_24),
        (Scheme(name="int8_static"), Layout.PLAIN),
        (Scheme(name="int8_dynamic_int4", group_size=32), Layout.INT4_DYNAMIC_CPU),
        (Scheme(name="int8_dynamic_int4", group_size=32), Layout.PLAIN),
        (Scheme(name="int8_dynamic_int4", group_size=32), Layout.TRITON_TILED),
        (Scheme(name="float8"), Layout.PLAIN),
        (Scheme(name="float8_dynamic"), Layout.PLAIN),
        (Scheme(name="float8_dynamic", per_tensor=True), Layout.PLAIN),
        (Scheme(name="float8_static"), Layout.PLAIN),
    )
]
HALF = (Layout.TENSOR_CORE_TILED, Layout.TRITON_TILED, Layout.INT4_CPU)
SLOW = [pytest.param(*c.values, marks=pytest.mark.slow, id=f"slow {c.id}") for c in CASES]
pytestmark = pytest.mark.filterwarnings("ignore")


class Net(nn.Module):
    """Two linears, the first with a factor on its inputs."""

    def __init__(self, scheme: Scheme, layout: Layout) -> None:
        super().__init__()
        dtype = torch.bfloat16 if layout in HALF or scheme.name == "int8" else torch.float32
        self.dtype = dtype
        self.up = nn.Linear(64, 32, dtype=dtype)
        self.down = nn.Linear(32, 32, bias=False, dtype=dtype)
        sparse = layout == Layout.SPARSE_24
        for module, columns in ((self.up, 64), (self.down, 32)):
            ours = linear(scheme, 32, columns, stored=dtype, factor=columns == 64, sparse=sparse)
            module.weight = nn.Parameter(laid(ours, dtype, layout), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(nn.functional.silu(self.up(x)))
        return y


@pytest.fixture(autouse=True)
def own_settings() -> Iterator[None]:
    """Tests of other files compile nothing, and must not meet these settings either."""
    import torch._inductor.config as config

    saved, precision = config.save_config(), torch.get_float32_matmul_precision()
    yield
    config.load_config(saved)
    torch.set_float32_matmul_precision(precision)
    inductor._applied.clear()
    torch._dynamo.reset()


def same(actual: Tensor, wanted: Tensor) -> bool:
    most = 2e-2 if wanted.dtype == torch.bfloat16 else 1e-4  # a rounded input may fall elsewhere
    return bool((actual - wanted).norm() <= most * wanted.norm())


def compiled_is_eager(net: Net) -> None:
    compiled = torch.compile(net, fullgraph=True)
    with torch.no_grad():
        for shape in ((2, 5, 64), (3, 7, 64)):
            x = tokens(*shape, dtype=net.dtype)
            assert same(compiled(x), net(x))
        turned = tokens(5, 2, 64, dtype=net.dtype).transpose(0, 1)
        assert same(compiled(turned), net(turned))


def compiled_is_eager_with_gradients(net: Net) -> None:
    """As a model whose embeddings or norms need them: its backward is traced, and may be run."""
    compiled = torch.compile(net, fullgraph=True)
    x = tokens(2, 5, 64, dtype=net.dtype)
    grads = []
    for run in (compiled, net):
        mine = x.clone().requires_grad_()
        y = run(mine)
        y.sum().backward()
        grads.append((y, mine.grad))
    for ours, theirs in zip(*grads, strict=True):
        assert ours is not None and theirs is not None
        assert same(ours, theirs)


def test_a_model_is_compiled_where_gradients_are_on() -> None:
    compiled_is_eager_with_gradients(Net(INT4, Layout.INT4_CPU))


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "layout"), CASES)
def test_every_kind_is_compiled_where_gradients_are_on(scheme: Scheme, layout: Layout) -> None:
    compiled_is_eager_with_gradients(Net(scheme, layout))


def test_a_compiled_linear_is_the_eager_one() -> None:
    compiled_is_eager(Net(INT4, Layout.INT4_CPU))


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "layout"), CASES)
def test_every_kind_compiles_whole(scheme: Scheme, layout: Layout) -> None:
    compiled_is_eager(Net(scheme, layout))


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "layout"), CASES)
def test_every_kind_compiles_with_the_recommended_settings(scheme: Scheme, layout: Layout) -> None:
    recommended_inductor_settings()
    compiled_is_eager(Net(scheme, layout))


@pytest.mark.slow
def test_it_compiles_behind_a_wrapper_in_cpp() -> None:
    import torch._inductor.config as config

    with config.patch(cpp_wrapper=True):
        compiled_is_eager(Net(Scheme(name="int8_dynamic"), Layout.PLAIN))


@pytest.mark.parametrize(("scheme", "layout"), CASES)
def test_every_kind_is_exported_for_any_number_of_tokens(scheme: Scheme, layout: Layout) -> None:
    net = Net(scheme, layout).eval()
    example = tokens(2, 5, 64, dtype=net.dtype)
    free = {0: torch.export.Dim("sequences"), 1: torch.export.Dim("length")}
    with torch.no_grad():
        program = torch.export.export(net, (example,), dynamic_shapes={"x": free}).module()
        for shape in ((2, 5, 64), (3, 7, 64)):
            x = tokens(*shape, dtype=net.dtype)
            assert same(program(x), net(x))


@pytest.mark.parametrize(
    ("scheme", "layout"),
    [CASES[1], *SLOW],
)
def test_aot_inductor_packages_it(scheme: Scheme, layout: Layout, tmp_path: Path) -> None:
    net = Net(scheme, layout).eval()
    x = tokens(2, 5, 64, dtype=net.dtype)
    with torch.no_grad():
        program = torch.export.export(net, (x,))
        file = str(tmp_path / "net.pt2")
        torch._inductor.aoti_compile_and_package(program, package_path=file)
        assert same(torch._inductor.aoti_load_package(file)(x), net(x))


def test_settings_are_applied_once_and_may_be_overridden() -> None:
    import torch._inductor.config as config

    config.max_autotune = False  # whatever ran before
    recommended_inductor_settings()
    for name, value in SETTINGS.items():
        place = config
        for part in name.split("."):
            place = getattr(place, part)
        assert place == value
    assert torch.get_float32_matmul_precision() == "high"
    config.max_autotune = False
    recommended_inductor_settings()
    assert not config.max_autotune
    recommended_inductor_settings(again=True)
    assert config.max_autotune
