"""Which models' steps are given our attention: those whose own it is, eager and compiled.

A CPU stands for an accelerator: its attention is the reference's, or the kernel's, interpreted.
"""

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from quantkernels import forward
from torch import Tensor, nn

from tests.conftest import _configs
from workers.attending import OURS, stepping
from workers.decoding import Decoder, likeliest

HAS_TRITON = importlib.util.find_spec("triton") is not None
BATCH, LENGTH = 2, 20


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    torch._dynamo.utils.counters.clear()  # a reset leaves them as other tests did
    with torch.no_grad():
        yield
    torch._dynamo.reset()


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many places each call of ours had."""
    calls: list[int] = []

    def attended(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        calls.append(k.shape[2])
        return forward.reference.attended(q, k, v, mask, scale)

    monkeypatch.setattr(forward, "FUSED_DEVICES", ("cpu",))
    monkeypatch.setattr(forward, "attended", attended)
    return calls


def made(family: str, implementation: str = "sdpa", dtype: torch.dtype = torch.float32) -> Any:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = _configs()[family]()
    return AutoModelForCausalLM.from_config(
        config, dtype=dtype, attn_implementation=implementation
    ).eval()


def prompt(words: int = 320) -> Tensor:
    return torch.randint(0, words, (BATCH, 7), generator=torch.Generator().manual_seed(0))


def steps(decoder: Decoder, count: int = 6) -> tuple[Tensor, Tensor]:
    """The tokens taken, and the last logits."""
    decoder.begin(prompt())
    taken = [decoder.ids_B1.clone(), *(decoder.step().clone() for _ in range(count))]
    return torch.cat(taken, dim=1), decoder.logits_BV.clone()


def same(ours: Decoder, theirs: Decoder) -> bool:
    found, wanted = steps(ours), steps(theirs)
    return torch.equal(found[0], wanted[0]) and torch.allclose(found[1], wanted[1], atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "mixtral"])
def test_steps_of_a_model_of_sdpa_are_ours_and_prompts_are_not(
    family: str, called: list[int]
) -> None:
    model = made(family)
    ours = Decoder(model, BATCH, LENGTH)
    layers = model.config.num_hidden_layers
    assert len(called) == layers, "each was tried beside torch's"
    called.clear()
    assert same(ours, Decoder(model, BATCH, LENGTH, attention="torch"))
    assert len(called) == 6 * layers
    assert model.config._attn_implementation == "sdpa", "for whoever else calls it"
    called.clear()
    model(prompt()[:, :1])
    assert called == []


def test_another_attention_stays(called: list[int]) -> None:
    for model in (made("llama", "eager"), made("gemma2", "eager")):
        steps(Decoder(model, BATCH, LENGTH))
        assert called == []


@pytest.mark.parametrize("off", [0.02, torch.nan])
def test_a_kernel_that_does_not_agree_is_left_alone(
    off: float, called: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*of: Any) -> Tensor:
        called.append(0)
        return forward.reference.attended(*of) * (1 + off)

    monkeypatch.setattr(forward, "attended", wrong)
    model = made("llama")
    ours = Decoder(model, BATCH, LENGTH)
    assert called
    called.clear()
    assert same(ours, Decoder(model, BATCH, LENGTH, attention="torch"))
    assert called == []


def test_a_model_that_asks_for_the_name_stays(called: list[int]) -> None:
    model = made("llama")
    inner = model.forward

    def forward_by_name(*args: Any, **named: Any) -> Any:
        output = inner(*args, **named)
        if model.config._attn_implementation != "sdpa":
            output.logits = output.logits * 1.5
        return output

    model.forward = forward_by_name
    assert same(Decoder(model, BATCH, LENGTH), Decoder(model, BATCH, LENGTH, attention="torch"))


def test_what_the_kernel_does_not_know_goes_to_sdpa_as_it_came(called: list[int]) -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as NAMED

    Decoder(made("llama"), BATCH, LENGTH)  # which registers it
    called.clear()
    draw = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, heads, n, 16, generator=draw) for heads, n in ((4, 1), (2, 9), (2, 9))
    )
    module = nn.Module()
    module.num_key_value_groups = 2  # type: ignore[assignment]
    plain = NAMED["sdpa"](module, q, k, v, None, scaling=0.3)[0]
    known = NAMED[OURS](module, q, k, v, None, scaling=0.3, sliding_window=4, use_cache=True)[0]
    assert len(called) == 1 and torch.allclose(known, plain, atol=1e-6)
    assert torch.allclose(
        NAMED[OURS](module, q, k, v, None)[0], NAMED["sdpa"](module, q, k, v, None)[0], atol=1e-6
    )
    called.clear()
    bias = torch.randn(1, 4, 1, 9, generator=draw)
    others: list[dict[str, Any]] = [{"position_bias": bias}, {"s_aux": bias[0, :, 0, 0]}]
    for more in others:
        found = NAMED[OURS](module, q, k, v, None, scaling=0.3, **more)[0]
        assert torch.equal(found, NAMED["sdpa"](module, q, k, v, None, scaling=0.3, **more)[0])
    NAMED[OURS](module, q, k, v, None, scaling=0.3, dropout=0.5)
    two = q.repeat(1, 1, 2, 1)
    found = NAMED[OURS](module, two, k, v, None, is_causal=False)[0]
    assert torch.equal(found, NAMED["sdpa"](module, two, k, v, None, is_causal=False)[0])
    with torch.enable_grad():
        NAMED[OURS](module, q.clone().requires_grad_(), k, v, None)[0].sum().backward()
    assert called == []


def test_on_a_cpu_nothing_is_tried() -> None:
    def step() -> Tensor:
        raise AssertionError("a step")

    with stepping(made("llama"), step)():
        pass


@pytest.mark.skipif(
    not HAS_TRITON or torch.cuda.is_available(), reason="needs triton, and no GPU: it interprets"
)
@pytest.mark.parametrize("mode", [None, "default"])
def test_eager_or_compiled_the_kernel_steps_as_torch_does(
    mode: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from quantkernels.forward import attention

    ran: list[int] = []
    launch: Callable[..., Tensor] = attention.attended

    def counted(*of: Any) -> Tensor:
        ran.append(1)
        return launch(*of)

    monkeypatch.setattr(attention, "attended", counted)
    monkeypatch.setattr(forward, "FUSED_DEVICES", ("cpu",))
    model = made("llama")
    ours = Decoder(model, BATCH, LENGTH, mode=mode)
    ours.capture(prompt())
    ran.clear()
    assert same(ours, Decoder(model, BATCH, LENGTH, attention="torch"))
    assert len(ran) == 6 * model.config.num_hidden_layers
    assert torch._dynamo.utils.counters["graph_break"] == {}


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("mode", [None, "default"])
def test_on_a_gpu_replays_step_as_torch_does(family: str, mode: str | None) -> None:
    model = made(family, dtype=torch.bfloat16).cuda()
    ours, theirs = (Decoder(model, BATCH, LENGTH, mode, of) for of in ("ours", "torch"))  # type: ignore[arg-type]
    for decoder in (ours, theirs):
        decoder.capture(prompt().cuda())
        decoder.begin(prompt().cuda())
    for _ in range(8):
        theirs.ids_B1.copy_(ours.ids_B1)
        ours.step(), theirs.step()
        off = (ours.logits_BV - theirs.logits_BV).norm() / theirs.logits_BV.norm()
        assert off < 0.03


@pytest.mark.parametrize("words", [5, 320, 4096, 4099, 49_152, 128_256, 151_936])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_likeliest_is_the_first_of_the_greatest(words: int, dtype: torch.dtype) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    draw = torch.Generator().manual_seed(words)
    logits_BV = torch.randn(9, words, generator=draw).to(device, dtype)  # level at times
    logits_BV[1] = 2.0
    logits_BV[2, [words // 2, words - 1]] = 9.0
    logits_BV[3, -1] = 9.0
    logits_BV[4] = -torch.inf
    logits_BV[5, words // 3] = torch.nan
    logits_BV[6, [0, words - 1]] = torch.inf
    logits_BV[7] = torch.finfo(dtype).min
    wanted_B1 = logits_BV.argmax(-1, keepdim=True)
    assert torch.equal(likeliest(logits_BV), wanted_B1)
    assert wanted_B1[:, 0].tolist()[1:8] == [0, words // 2, words - 1, 0, words // 3, 0, 0]
    assert torch.equal(likeliest(logits_BV[:1]), wanted_B1[:1])
