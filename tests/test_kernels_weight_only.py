"""The weight-only product: its reference, and the Triton kernel beside it (tests/tiled.py)."""

import dataclasses
import itertools

import pytest
import torch
from quantkernels.launches import OTHER, Launch
from quantkernels.weight_only import dense, linear, reference
from quantkernels.weight_only.tiles import Tiles, pack_groups, program_rows, unpack_groups
from torch import Tensor

from tests.tiled import (
    DEVICE,
    FORMS,
    HALVES,
    ON_GPU,
    SMALL,
    Form,
    inputs,
    needs_triton,
    relative,
    weight_of,
)

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("shape", [(5, 96), (130, 320), (1, 512)])
def test_the_reference_is_the_formula(form: Form, shape: tuple[int, int]) -> None:
    rows, columns = shape
    size = form[1] or 1
    weight, w_OI = weight_of(*form, rows, max(columns // size, 1) * size)
    assert relative(reference.dense(weight, torch.float32), w_OI) < 1e-6
    x_TI = inputs(3, weight.features[1], torch.float32)
    wanted_TO = x_TI.double().cpu().numpy() @ w_OI.T
    assert relative(reference.linear(x_TI, weight, None), wanted_TO) < 1e-5


LAUNCHES = [
    SMALL,
    Launch(rows=64, tokens=16, split=3, turn=128, stages=2, warps=2),
    Launch(rows=128, tokens=16, split=2, turn=256, stages=3, warps=4, early=True),
    Launch(rows=64, tokens=32, split=2, turn=64, stages=2, warps=4),
    Launch(rows=32, tokens=32, split=1, turn=256, stages=2, warps=4, early=True),
]

if ON_GPU:  # which the interpreter cannot be
    many = {"early": True, "overlapped": True}
    LAUNCHES += [
        Launch(rows=128, tokens=64, split=1, turn=64, stages=3, warps=4, **many),
        Launch(rows=256, tokens=128, split=2, turn=128, stages=3, warps=8, **many),
        Launch(rows=128, tokens=256, split=3, turn=128, stages=2, warps=8, **many),
        Launch(rows=128, tokens=32, split=2, turn=64, stages=4, warps=8, **many),
    ]


@needs_triton
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("launch", LAUNCHES, ids=range(len(LAUNCHES)))
def test_the_kernel_is_the_formula(form: Form, launch: Launch, dtype: torch.dtype) -> None:
    from quantkernels.weight_only import fused

    size = form[1] or 1
    shapes = [(130, 768, 17), (5, 256, 1)] + [(130, 768, 1), (5, 256, 17)] * ON_GPU
    for rows, columns, tokens in shapes:
        weight, w_OI = weight_of(*form, rows, columns // size * size)
        x_TI = inputs(tokens, weight.features[1], dtype)
        bias_O = inputs(1, rows, dtype)[0]
        wanted_TO = x_TI.double().cpu().numpy() @ w_OI.T + bias_O.double().cpu().numpy()
        y_TO = fused.linear(x_TI, weight, bias_O, launch)
        most = 4e-3 if dtype == torch.bfloat16 else 8e-4
        assert y_TO.dtype == dtype and relative(y_TO, wanted_TO) < most


def in_16_bits(weight: Tiles, dtype: torch.dtype) -> Tiles:
    features, size = weight.features, weight.group or None
    packed = [
        None
        if of is None
        else pack_groups(unpack_groups(of, features, size).to(dtype), features[1], weight.group)
        for of in (weight.scale, weight.zero)
    ]
    assert packed[0] is not None and packed[0].nbytes == weight.scale.nbytes // 2
    return dataclasses.replace(weight, scale=packed[0], zero=packed[1])


# the interpreter takes seconds for each
TAKEN = [
    pytest.param(form, torch.bfloat16, marks=[] if ON_GPU or at % 3 == 0 else [pytest.mark.slow])
    for at, form in enumerate(FORMS)
]


@needs_triton
@pytest.mark.parametrize(
    ("form", "dtype"),
    [*TAKEN, *((form, torch.float16) for form in FORMS[1:3])],
    ids=str,
)
def test_scales_in_16_bits_give_the_bits_of_those_in_32(form: Form, dtype: torch.dtype) -> None:
    """They are the same numbers: sums keep their order and their rounding."""
    from quantkernels.weight_only import fused

    served = dtype if ON_GPU else torch.float16
    size = form[1] or 1
    weight, _ = weight_of(*form, 130, (768 if ON_GPU else 384) // size * size)
    halves = in_16_bits(weight, dtype)
    assert torch.equal(fused.dense(halves, served), fused.dense(weight, served))
    assert torch.equal(reference.dense(halves, served), reference.dense(weight, served))
    x_TI, bias_O = inputs(17, weight.features[1], served), inputs(1, 130, served)[0]
    for launch in LAUNCHES[1:3] + LAUNCHES[5:7]:
        y_TO = fused.linear(x_TI, halves, bias_O, launch)
        assert torch.equal(y_TO, fused.linear(x_TI, weight, bias_O, launch)), launch


@needs_triton
def test_no_program_reads_past_the_last_tile() -> None:
    """Rows are padded to 128; a launch for 256 at a time finds but one tile at the end."""
    from quantkernels.weight_only import fused

    tall = Launch(rows=256, tokens=16, split=2, turn=128, stages=2, warps=8)
    heights = {rows: program_rows(rows, tall.rows) for rows in (1, 128, 130, 256, 300, 512)}
    assert heights == {1: 128, 128: 128, 130: 256, 256: 256, 300: 128, 512: 256}
    assert program_rows(300, SMALL.rows) == SMALL.rows
    weight, w_OI = weight_of("int8", None, "affine", False, 300, 256)
    x_TI = inputs(3, 256, torch.float16)
    y_TO = fused.linear(x_TI, weight, None, tall)
    assert relative(y_TO, x_TI.double().cpu().numpy() @ w_OI.T) < 8e-4


@needs_triton
@pytest.mark.parametrize("form", FORMS[:2] + FORMS[6:8], ids=str)
def test_odd_widths_and_strides_are_taken(form: Form) -> None:
    """A width that fills no tile; inputs that are columns of something larger, NaN around them."""
    from quantkernels.weight_only import fused

    columns = 320 if form[1] else 301
    weight, w_OI = weight_of(*form, 70, columns)
    wide = torch.full((40, columns + 9), torch.nan, dtype=torch.float16, device=DEVICE)
    wide[3:39:12, 5 : 5 + columns] = inputs(3, columns, torch.float16)
    for x_TI in (wide[3:39:12, 5 : 5 + columns], inputs(columns, 3, torch.float16).t()):
        y_TO = fused.linear(x_TI, weight, None, LAUNCHES[1])
        assert relative(y_TO, x_TI.double().cpu().numpy() @ w_OI.T) < 8e-4


def test_no_tokens_and_no_rows_give_nothing() -> None:
    weight, _ = weight_of("int4", 32, "affine", False, 8, 64)
    assert linear(inputs(0, 64, torch.float16), weight).shape == (0, 8)
    assert dense(weight, torch.float32).shape == (8, 64)


@needs_triton
def test_no_tokens_make_no_dense_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    from quantkernels.weight_only import fused

    def refused(*_: object) -> Tensor:
        raise AssertionError("a dense weight of a head is a gigabyte")

    monkeypatch.setattr("quantkernels.weight_only.FUSED_DEVICES", (DEVICE,))
    for place in ((reference, "dense"), (fused, "dense"), (torch.nn.functional, "linear")):
        monkeypatch.setattr(*place, refused)
    weight, _ = weight_of("int4", 32, "affine", False, 8, 64)
    bias_O = torch.ones(8, device=DEVICE)
    y_TO = linear(inputs(0, 64, torch.float16), weight, bias_O)
    assert y_TO.shape == (0, 8) and y_TO.dtype == torch.float16


@needs_triton
@pytest.mark.parametrize("launch", [SMALL, OTHER], ids=["ours", "dense"])
@pytest.mark.parametrize("accelerated", [False, True])
def test_a_bias_has_any_floating_dtype(
    launch: Launch, accelerated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if accelerated:
        monkeypatch.setattr("quantkernels.weight_only.FUSED_DEVICES", (DEVICE,))
    monkeypatch.setattr("quantkernels.weight_only.gpu_of", lambda _: ("", 1))
    monkeypatch.setattr("quantkernels.weight_only.launch_of", lambda *_: launch)
    weight, w_OI = weight_of("int8", None, "affine", False, 8, 64)
    x_TI, bias_O = inputs(3, 64, torch.float16), inputs(1, 8, torch.float32)[0]
    y_TO = linear(x_TI, weight, bias_O)
    wanted_TO = x_TI.double().cpu().numpy() @ w_OI.T + bias_O.double().cpu().numpy()
    assert y_TO.dtype == torch.float16 and relative(y_TO, wanted_TO) < 1e-3


@needs_triton
def test_rows_that_share_memory_and_columns_far_apart_are_copied() -> None:
    """Of an expanded row the accelerator of memory has no rows; in 32 bits far columns overflow."""
    from quantkernels.weight_only import fused

    one_TI = inputs(1, 64, torch.float16)
    assert fused.apart(one_TI.expand(40, 64)).stride() == (64, 1)
    windows_TI = inputs(1, 256, torch.float16)[0].unfold(0, 64, 8)
    assert torch.equal(fused.apart(windows_TI), windows_TI)
    assert fused.apart(windows_TI).stride() == (64, 1)
    far_TI = torch.empty(64, 1 << 25, dtype=torch.float16, device="meta").t()
    assert fused.apart(far_TI).stride() == (64, 1)
    for x_TI in (one_TI, one_TI[:, :32], inputs(64, 40, torch.float16).t()):
        assert fused.apart(x_TI) is x_TI
    weight, w_OI = weight_of("int8", None, "affine", False, 8, 64)
    y_TO = fused.linear(windows_TI, weight, None, SMALL)
    assert relative(y_TO, windows_TI.double().cpu().numpy() @ w_OI.T) < 8e-4


@pytest.mark.parametrize(
    ("x_TI", "bias_O", "words"),
    [
        (torch.zeros(3, 64), None, r"x is \(3, 64\): write \(T, 128\) for a weight of 24 by 128"),
        (torch.zeros(3, 256), None, r"x is \(3, 256\)"),
        (torch.zeros(128), None, r"x is \(128,\): write \(T, 128\)"),
        (torch.zeros(3, 128), torch.zeros(1), r"bias is \(1,\): write \(24,\)"),
        (torch.zeros(3, 128), torch.zeros(24, device="meta"), "the bias on meta: write .to()"),
        (torch.zeros(3, 128, device="meta"), None, f"x is on meta and the weight on {DEVICE}"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_before_memory_is_read_by_it(
    x_TI: Tensor, bias_O: Tensor | None, words: str
) -> None:
    weight, _ = weight_of("int4", 64, "affine", False, 24, 128)
    given = [t if t is None or t.is_meta else t.to(DEVICE, torch.bfloat16) for t in (x_TI, bias_O)]
    with pytest.raises(ValueError, match=words):
        linear(given[0], weight, given[1])


def test_an_accelerator_takes_inputs_of_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantkernels.weight_only.FUSED_DEVICES", (DEVICE,))
    weight, _ = weight_of("int4", 64, "affine", False, 24, 128)
    with pytest.raises(ValueError, match=r"x is torch.float32: write torch.bfloat16 or"):
        linear(inputs(3, 128, torch.float32), weight)


@pytest.mark.parametrize("zero", [False, True])
def test_the_operator_is_what_torch_asks_of_one(zero: bool) -> None:
    weight, _ = weight_of("int4", 64, "affine", zero, 24, 128)
    x_TI, bias_O = inputs(3, 128, torch.bfloat16), inputs(1, 24, torch.bfloat16)[0]
    arguments = (x_TI, weight.codes_RPBW, weight.scale, weight.zero, bias_O)
    torch.library.opcheck(
        torch.ops.quantkernels.weight_only_linear.default,
        (*arguments, weight.kind, weight.grid, weight.group, *weight.features),
    )


@pytest.mark.gpu
def test_graphs_that_run_at_once_share_no_counters() -> None:
    """Two captured products, whose tiles are finished by the last of many, on two streams."""
    weight, _ = weight_of("int4", 128, "affine", False, 512, 8192)
    x_TI = inputs(1, 8192, torch.bfloat16)
    wanted_TO = linear(x_TI, weight)
    graphs, outs = [], []
    for _ in range(2):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outs.append([linear(x_TI, weight) for _ in range(20)])
        graphs.append(graph)
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    for _ in range(20):
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    for y_TO in itertools.chain(*outs):
        assert torch.equal(y_TO, wanted_TO)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 3, 16, 40, 64, 128, 200, 1000])
def test_the_launch_that_is_chosen_is_right(tokens: int) -> None:
    for form, (rows, columns) in itertools.product(
        [FORMS[2], FORMS[3], FORMS[6], FORMS[9]], [(4096, 4096), (1000, 2304), (1, 512)]
    ):
        weight, w_OI = weight_of(*form, rows, columns)
        x_TI = inputs(tokens, columns, torch.bfloat16)
        wanted_TO = x_TI.double() @ torch.from_numpy(w_OI).cuda().T
        y_TO = linear(x_TI, weight)
        assert (y_TO - wanted_TO).norm() < 4e-3 * wanted_TO.norm()
        assert torch.equal(y_TO, linear(x_TI, weight))
