"""The recorder against inputs that a test's own hooks keep whole, in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from quantcore.gptq import GptqConfig, factorize
from quantcore.recorder import Recorder
from tests.references import second_moment

WIDTH, INNER = 12, 20


class Layer(nn.Module):
    """Three linears that read one input, and one that reads what they make of it."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(WIDTH, INNER)
        self.k_proj = nn.Linear(WIDTH, INNER)
        self.v_proj = nn.Linear(WIDTH, INNER, bias=False)
        self.o_proj = nn.Linear(INNER, WIDTH)

    def forward(self, x_BLI: Tensor) -> Tensor:
        mixed_BLI = self.q_proj(x_BLI).relu() + self.k_proj(x_BLI) * self.v_proj(x_BLI)
        result: Tensor = x_BLI + self.o_proj(mixed_BLI)
        return result


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x_BLI: Tensor) -> Tensor:
        for layer in self.layers:
            x_BLI = layer(self.norm(x_BLI))
        return x_BLI


@pytest.fixture
def model() -> Model:
    torch.manual_seed(3)
    return Model()


def batches(count: int = 3, tokens: int = 7, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, tokens + n, WIDTH, generator=generator) for n in range(count)]


def kept(model: nn.Module, run: Callable[[], None]) -> dict[str, Tensor]:
    """Every linear's inputs, whole: (T, I)."""
    seen: dict[str, list[Tensor]] = {}
    handles = [
        module.register_forward_pre_hook(
            lambda _, args, name=name: seen.setdefault(name, []).append(args[0].flatten(0, -2))
        )
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    with torch.no_grad():
        run()
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


def record(module: nn.Module, inputs: list[Tensor], **options: Any) -> Recorder:
    recorder = Recorder(module, **options)
    with recorder:
        for x in inputs:
            module(x)
    return recorder


def test_statistics_are_those_of_all_inputs(model: Model) -> None:
    inputs = batches()
    expected = kept(model, lambda: [model(x) for x in inputs] and None)
    recorder = record(model, inputs)
    assert set(recorder) == set(expected)
    for name, x_TI in expected.items():
        found = recorder[name]
        assert found.moments is not None and found.ranges is not None
        assert found.moments.tokens == found.ranges.tokens == len(x_TI)
        assert found.in_features == x_TI.shape[1]
        h_II = found.moments.mean().double()
        torch.testing.assert_close(
            h_II, torch.from_numpy(second_moment(x_TI)), rtol=1e-5, atol=1e-5
        )
        assert torch.equal(found.ranges.low_I, x_TI.amin(0).clamp(max=0))
        assert torch.equal(found.ranges.high_I, x_TI.amax(0).clamp(min=0))
        assert found.ranges.sample_SI.shape == (4 * len(inputs), x_TI.shape[1])
        same_ST = (found.ranges.sample_SI[:, None] == x_TI).all(dim=2)
        assert same_ST.any(dim=1).all()


def test_linears_that_read_one_tensor_share_statistics(model: Model) -> None:
    recorder = record(model, batches())
    assert [group.linears for group in recorder.groups()] == [
        tuple(f"layers.{n}.{p}_proj" for p in group) for n in (0, 1) for group in ("qkv", "o")
    ]
    assert recorder["layers.1.q_proj"] is recorder["layers.1.v_proj"]
    assert recorder["layers.0.q_proj"] is not recorder["layers.1.q_proj"]
    apart = record(model, batches(), share=False)
    assert len(apart.groups()) == 8
    for name in recorder:
        assert torch.equal(apart[name].moments.sum_II, recorder[name].moments.sum_II)


@settings(deadline=None, max_examples=30)
@given(st.data())
def test_masked_tokens_count_nowhere(data: st.DataObject) -> None:
    """As if they had not been there: a linear looks at each token alone. Masks may be empty."""
    linear = nn.Linear(WIDTH, 3)
    masks = [
        torch.tensor(data.draw(st.lists(st.booleans(), min_size=n, max_size=n))) for n in (6, 1, 9)
    ]
    inputs = [torch.randn(n, WIDTH) for n in (6, 1, 9)]
    masked, alone = Recorder(linear), Recorder(linear)
    with masked:
        for x_TI, mask_T in zip(inputs, masks, strict=True):
            with masked.only(mask_T):
                linear(torch.where(mask_T[:, None], x_TI, torch.nan))
    with alone:
        for x_TI, mask_T in zip(inputs, masks, strict=True):
            linear(x_TI[mask_T])
    ours, theirs = masked[""], alone[""]
    assert ours.moments.tokens == sum(int(mask.sum()) for mask in masks)
    assert ours.moments.dropped == ours.ranges.dropped == 0
    assert torch.equal(ours.moments.sum_II, theirs.moments.sum_II)
    for name in ("low_I", "high_I", "sample_SI"):
        assert torch.equal(getattr(ours.ranges, name), getattr(theirs.ranges, name))


def test_a_mask_holds_for_its_own_calls_alone(model: Model) -> None:
    recorder = Recorder(model)
    with recorder:
        with recorder.only(torch.tensor([[True] * 3, [True, False, False]])):
            model(torch.randn(2, 3, WIDTH))
        model(torch.randn(1, 5, WIDTH))
    assert {group.moments.tokens for group in recorder.groups()} == {9}


def test_recording_changes_neither_outputs_nor_gradients(model: Model) -> None:
    (x_BLI,) = batches(1)
    plain = model(x_BLI)
    with Recorder(model):
        recorded = model(x_BLI)
    assert torch.equal(plain, recorded)
    recorded.sum().backward()
    assert all(parameter.grad is not None for parameter in model.layers.parameters())


def test_a_recorder_goes_on_where_it_was(model: Model) -> None:
    inputs = batches()
    at_once = record(model, inputs)
    recorder = Recorder(model)
    with recorder:
        model(inputs[0])
    model(inputs[0])  # counts not
    with recorder, torch.inference_mode():
        model(inputs[1])
        model(inputs[2])
    for name in at_once:
        assert torch.equal(recorder[name].moments.sum_II, at_once[name].moments.sum_II)


def test_a_filter_chooses_and_other_modules_may_be_watched(model: Model) -> None:
    recorder = record(model, batches(), linears=lambda name, _: name.endswith("o_proj"))
    assert list(recorder) == ["layers.0.o_proj", "layers.1.o_proj"]
    norms = record(model, batches(), linears=lambda _, m: isinstance(m, nn.LayerNorm))
    assert norms["norm"].moments.tokens == 2 * sum(x.shape[0] * x.shape[1] for x in batches())


def test_either_statistic_may_be_left_out(model: Model) -> None:
    recorder = record(model, batches(), ranges=False)
    assert recorder["layers.0.q_proj"].ranges is None
    recorder = record(model, batches(), moments=False, sample_rows=1)
    assert recorder["layers.0.q_proj"].moments is None
    assert len(recorder["layers.0.q_proj"].ranges.sample_SI) == 3


def test_calls_are_counted_by_their_tokens_and_a_sample_is_bounded(model: Model) -> None:
    inputs = [torch.randn(2, tokens, WIDTH) for tokens in (3, 5, 3, 8)]
    recorder = record(model, inputs, moments=False, sample_rows=4, most_rows=9)
    for statistics in recorder.groups():
        assert statistics.calls == {6: 2, 10: 1, 16: 1}
        assert statistics.ranges.tokens == 38
        assert len(statistics.ranges.sample_SI) == 9
    unbounded = record(model, inputs, moments=False, sample_rows=4)
    for name in recorder:
        sample_SI = unbounded[name].ranges.sample_SI
        assert torch.equal(recorder[name].ranges.sample_SI, sample_SI[:9])
        assert len(sample_SI) == 16


def test_the_record_is_what_gptq_takes(model: Model) -> None:
    moments = record(model, batches(9))["layers.0.o_proj"].moments
    factor = factorize(moments.mean(), GptqConfig())
    assert factor.upper_II.shape == (INNER, INNER)


def test_an_input_by_keyword_is_seen() -> None:
    class ByName(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(WIDTH, 2)

        def forward(self, x: Tensor) -> Any:
            return self.inner(input=x)

    assert record(ByName(), [torch.ones(4, WIDTH)])["inner"].moments.tokens == 4


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes(model: Model, dtype: torch.dtype) -> None:
    linear = nn.Linear(WIDTH, 3).to(dtype)
    x_TI = torch.randn(40, WIDTH, generator=torch.Generator().manual_seed(2)).to(dtype)
    h_II = record(linear, [x_TI])[""].moments.mean().double()
    expected = torch.from_numpy(second_moment(x_TI))
    torch.testing.assert_close(h_II, expected, rtol=1e-5, atol=1e-5)


class Fickle(nn.Module):
    """Hands both linears one tensor at first; then something else, by `way`."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(WIDTH, 2), nn.Linear(WIDTH, 2)
        self.way, self.calls = way, 0

    def forward(self, x: Tensor) -> None:
        self.calls += 1
        way = self.way if self.calls > 1 or self.way == "written over at once" else ""
        self.one(x)
        if way == "another tensor":
            x = x + 1
        if way.startswith("written over"):
            x.add_(1)
        if way != "left out":
            self.two(x)
        if way == "twice":
            self.two(x)


@pytest.mark.parametrize("way", ["another tensor", "left out", "twice", "written over"])
def test_linears_that_part_ways_are_refused(way: str) -> None:
    with pytest.raises(ValueError, match=r"'two' was handed the same tensors as 'one', and now "):
        record(Fickle(way), [torch.ones(3, WIDTH) for _ in range(3)])
    recorder = record(Fickle(way), [torch.ones(3, WIDTH) for _ in range(3)], share=False)
    calls = {"left out": 1, "twice": 5}.get(way, 3)
    assert recorder["two"].moments.tokens == 3 * calls
    assert recorder["one"].moments.tokens == 9


def test_a_tensor_that_is_written_over_is_another(model: Model) -> None:
    recorder = record(Fickle("written over at once"), [torch.ones(3, WIDTH) for _ in range(2)])
    ones = torch.ones(WIDTH, WIDTH).tril()
    assert torch.equal(recorder["one"].moments.sum_II.tril(), 6 * ones)
    assert torch.equal(recorder["two"].moments.sum_II.tril(), 24 * ones)


def test_a_linear_that_comes_later_has_statistics_of_its_own() -> None:
    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(WIDTH, 2), nn.Linear(WIDTH, 2)
            self.calls = 0

        def forward(self, x: Tensor) -> None:
            self.calls += 1
            self.one(x)
            if self.calls > 1:
                self.two(x)

    recorder = record(Late(), [torch.ones(3, WIDTH) for _ in range(3)])
    assert (recorder["one"].moments.tokens, recorder["two"].moments.tokens) == (9, 6)


class TestRefusals:
    def test_a_module_without_linears(self) -> None:
        with pytest.raises(ValueError, match="LayerNorm has no linear to record: see `linears`"):
            Recorder(nn.LayerNorm(4))

    def test_nothing_to_record(self, model: Model) -> None:
        for options in ({"moments": False, "ranges": False}, {"sample_rows": 0}):
            with pytest.raises(ValueError, match="record moments or ranges, with sample_rows of 1"):
                Recorder(model, **options)

    def test_names_that_are_not_there(self, model: Model) -> None:
        recorder = Recorder(model)
        with pytest.raises(KeyError, match=r"'layers.0.q_proj' was not called"):
            recorder["layers.0.q_proj"]
        with pytest.raises(KeyError, match=r"'norm' is no linear that is watched"):
            recorder["norm"]

    def test_a_mask_of_another_size_or_kind(self, model: Model) -> None:
        recorder = Recorder(model)
        with recorder:
            with (
                pytest.raises(ValueError, match=r"for 4 tokens, and 'layers.0.q_proj' is handed 6"),
                recorder.only(torch.ones(4, dtype=torch.bool)),
            ):
                model(torch.randn(2, 3, WIDTH))
            with pytest.raises(ValueError, match=r"bool, not torch.int64: write mask.bool\(\)"):
                recorder.only(torch.ones(4, dtype=torch.int64)).__enter__()
            model(torch.randn(2, 3, WIDTH))
        assert {group.moments.tokens for group in recorder.groups()} == {6}
