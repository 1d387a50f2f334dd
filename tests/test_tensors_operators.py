"""A quantized tensor under torch's operators: views, slices, copies, moves, and what is refused."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from quantcore.errors import QuantizationError
from quantcore.schemes import Scheme
from quantcore.tensors import Layout, QuantizedTensor, relayout
from tests.quantized import FORMS, expected, laid, layouts_of, linear, relative, tokens

INT4 = Scheme(name="int4", group_size=32)
every_form = pytest.mark.parametrize("scheme", FORMS, ids=Scheme.label)


def plain(scheme: Scheme, rows: int = 12, width: int = 96, **options: Any) -> QuantizedTensor:
    return QuantizedTensor.of(linear(scheme, rows, width, **options), torch.float32)


@every_form
def test_slices_are_those_of_the_dense_weight(scheme: Scheme) -> None:
    weight = plain(scheme, factor=True)
    dense = weight.dequantize()
    for part, wanted in (
        (weight.narrow(0, 3, 5), dense.narrow(0, 3, 5)),
        (weight[2:], dense[2:]),
        (weight[:, 32:64], dense[:, 32:64]),
        (weight[-4:, 64:], dense[-4:, 64:]),
        (weight.t().narrow(0, 32, 64), dense.t().narrow(0, 32, 64)),
        (weight.t()[:, 1:4], dense.t()[:, 1:4]),
        (weight[5:5], dense[5:5]),
        (weight.narrow(1, 32, 64).narrow(0, 1, 1), dense[1:2, 32:]),
    ):
        assert isinstance(part, QuantizedTensor)
        assert part.shape == wanted.shape
        assert torch.equal(part.dequantize(), wanted)
    for parts, wholes in (
        (weight.chunk(3, dim=0), dense.chunk(3, dim=0)),
        (weight.chunk(3, dim=1), dense.chunk(3, dim=1)),
        (weight.split([2, 10]), dense.split([2, 10])),
        (weight.split(5), dense.split(5)),
    ):
        for part, wanted in zip(parts, wholes, strict=True):
            assert torch.equal(part.dequantize(), wanted)  # type: ignore[operator]


@every_form
def test_a_part_of_the_weight_multiplies_as_it_stands(scheme: Scheme) -> None:
    """By rows for all schemes; by columns where inputs have no range of their own."""
    ours = linear(scheme, 12, 96)
    weight = QuantizedTensor.of(ours, torch.float32)
    x_TI = tokens(4, 96, dtype=torch.float32)
    rows = nn.functional.linear(x_TI, weight[3:8])
    assert relative(rows, expected(x_TI, ours, None)[:, 3:8]) < 2e-6
    if scheme.activations is None or scheme.static:
        first = nn.functional.linear(x_TI[:, :32], weight[:, :32])
        both = first + nn.functional.linear(x_TI[:, 32:], weight[:, 32:])
        assert relative(both, expected(x_TI, ours, None)) < 2e-6


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(FORMS), st.integers(-14, 14), st.integers(-14, 14))
def test_rows_may_be_cut_anywhere(scheme: Scheme, first: int, last: int) -> None:
    weight = plain(scheme)
    assert torch.equal(weight[first:last].dequantize(), weight.dequantize()[first:last])


@every_form
def test_shards_are_copied_into_their_place(scheme: Scheme) -> None:
    """As tensor parallel engines load: an empty weight is filled by rows, or by columns."""
    full = plain(scheme, factor=True)
    for dim, places in ((0, [(0, 4), (4, 8)]), (1, [(0, 32), (32, 64)])):
        empty = torch.empty_like(full)
        assert isinstance(empty, QuantizedTensor)
        for first, count in places:
            empty.narrow(dim, first, count).copy_(full.narrow(dim, first, count))
        assert torch.equal(empty.dequantize(), full.dequantize())


def test_a_slice_shares_memory_and_a_clone_does_not() -> None:
    weight = plain(INT4)
    apart, shared = weight[2:4].clone(), weight[2:4]
    weight.codes.zero_()
    assert (shared.codes == 0).all()  # type: ignore[attr-defined]
    assert not (apart.codes == 0).all()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("cut", "words"),
    [
        (lambda w: w[:, 16:64], "multiples of 32"),
        (lambda w: w[:, :40], "multiples of 32"),
        (lambda w: w[::2], "no step"),
        (lambda w: w[3], r"narrow\(0, 3, 1\)"),
        (lambda w: w.select(1, 5), r"narrow\(1, 5, 1\)"),
        (lambda w: relayout(w.bfloat16(), "int4_cpu")[:8], "relayout"),
        (lambda w: w.copy_(torch.zeros(32, 96)), "dequantize"),
        (lambda w: w.copy_(plain(INT4, 32, 64)), "two of a kind"),
        (lambda w: w.copy_(plain(INT4, 32, 96, stored=torch.float32)), "two of a kind"),
    ],
)
def test_what_cannot_be_is_refused_by_name(cut: Any, words: str) -> None:
    with pytest.raises(QuantizationError, match=words):
        cut(plain(INT4, 32, 96))


def test_odd_columns_of_four_bits_are_cut_at_bytes() -> None:
    weight = plain(Scheme(name="int4"), 5, 33)
    assert torch.equal(weight[:, 4:].dequantize(), weight.dequantize()[:, 4:])
    with pytest.raises(QuantizationError, match="multiples of 2"):
        weight[:, 3:]


@pytest.mark.parametrize("operation", [torch.add, torch.mul])
def test_other_operators_say_what_to_write(operation: Any) -> None:
    with pytest.raises(NotImplementedError, match=r"dequantize\(\) first"):
        operation(plain(INT4), 2.0)


def test_views_keep_what_they_are() -> None:
    weight = plain(INT4, factor=True)
    turned = weight.t()
    assert (turned.shape, turned.t().shape) == ((96, 12), (12, 96))
    assert torch.equal(turned.dequantize(), weight.dequantize().t())
    assert torch.equal(weight.permute(1, 0).dequantize(), turned.dequantize())  # type: ignore[operator]
    assert torch.equal(weight.detach().dequantize(), weight.dequantize())
    assert "int4 sym g32, plain, shape=(96, 12)" in repr(turned)
    assert "transposed" in repr(turned)
    with pytest.raises(NotImplementedError, match="write"):
        weight.transpose(0, 0)


@every_form
def test_a_dtype_is_what_it_reads_back_as(scheme: Scheme) -> None:
    for layout in layouts_of(scheme, torch.float32):
        ours = linear(scheme, 32, 64, sparse=layout == Layout.SPARSE_24)
        weight = laid(ours, torch.float32, layout)
        if layout == Layout.INT4_DYNAMIC_CPU:
            continue
        half = weight.to(torch.bfloat16)
        assert half.dtype == torch.bfloat16
        assert isinstance(half, QuantizedTensor)
        assert torch.equal(half.codes, weight.codes)
        assert torch.equal(half.dequantize(), weight.dequantize().bfloat16())
        module = nn.Linear(64, 32)
        module.weight = nn.Parameter(weight, requires_grad=False)
        module.bfloat16()
        x_TI = tokens(3, 64, dtype=torch.bfloat16)
        bias_O = module.bias.detach()
        assert relative(module(x_TI), expected(x_TI, ours, bias_O)) < 8e-3
    with pytest.raises(NotImplementedError, match="floating"):
        weight.to(torch.int8)


def test_a_layout_stays_where_it_can_compute() -> None:
    weight = relayout(plain(INT4, 32, 96).bfloat16(), Layout.INT4_CPU)  # type: ignore[arg-type]
    with pytest.raises(QuantizationError, match="'int4_cpu' is of the cpu: write relayout"):
        torch.ops.aten._to_copy(weight, device=torch.device("cuda"))
    with pytest.raises(QuantizationError, match="computes in bfloat16"):
        weight.to(torch.float64)
    assert weight.to("meta").device.type == "meta"


def test_a_module_is_copied_deeply() -> None:
    module = nn.Linear(96, 12)
    module.weight = nn.Parameter(plain(INT4), requires_grad=False)
    copied = copy.deepcopy(module)
    assert isinstance(copied.weight, QuantizedTensor)
    assert isinstance(copied.weight, nn.Parameter)
    assert dict(copied.named_parameters()).keys() == {"weight", "bias"}
    module.weight.codes.zero_()  # type: ignore[operator]
    assert not (copied.weight.codes == 0).all()
    tied = nn.ModuleList([module, module])
    both = copy.deepcopy(tied)
    assert both[0].weight is both[1].weight


def test_it_is_not_pickled() -> None:
    with pytest.raises(QuantizationError, match="flatten_state"):
        torch.save(plain(INT4), "/dev/null")


def test_it_takes_as_much_memory_as_its_codes_and_scales() -> None:
    weight = plain(INT4, 32, 96)
    assert weight.num_bytes() == 32 * 48 + 32 * 3 * 2
