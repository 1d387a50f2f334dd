"""The decode benchmark at a size of nothing: what it counts, and that its gate holds."""

import argparse
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from tests.benchmarks import decode
from tests.benchmarks.decode import ROWS, Row, measure, random_model, run, table
from workers.decoding import Decoder

OPTIONS = argparse.Namespace(tokens=6, repeats=2, compile=None, apart=False, attention="ours")


def made() -> nn.Module:
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=256,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=2,
        vocab_size=160,
        tie_word_embeddings=False,
    )
    return random_model(config, "cpu")


def prompt() -> Tensor:
    return torch.randint(0, 160, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def settings_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile's settings are for the whole process, where other tests compile."""
    monkeypatch.setattr("quantcore.quantize.recommended_inductor_settings", lambda: None)


@pytest.mark.usefixtures("settings_left_alone")
def test_every_row_decodes_and_its_bytes_are_those_of_its_linears() -> None:
    measured = run(ROWS, made, prompt(), OPTIONS)
    assert [row.label for row in measured] == [row.label for row in ROWS]
    weights = 2 * (2 * 128 * 128 + 2 * 64 * 128 + 3 * 128 * 256) + 160 * 128
    rows = 2 * (2 * 128 + 2 * 64 + 2 * 256 + 128) + 160
    found = {row.label: row.linear_bytes for row in measured}
    assert found["bf16"] == 2 * weights
    assert found["int4 sym g64"] == weights / 2 + weights / 64 * 4  # scale and zero point
    assert found["int8 sym channel"] == weights + 2 * rows
    assert all(len(row.continuation) == OPTIONS.tokens for row in measured)
    lines = table(measured).splitlines()
    assert len(lines) == 2 + len(ROWS)
    assert "| bf16 |  |" in lines[2]


@pytest.mark.usefixtures("settings_left_alone")
def test_a_step_that_loses_its_place_does_not_pass_the_gate(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def forgetful(self: Decoder, ids_BT: Tensor) -> None:
        self._cache.reset()
        self._take(self._logits(ids_BT[:, 1:]))

    monkeypatch.setattr(Decoder, "begin", forgetful)
    with pytest.raises(AssertionError, match="bf16: logits are off"):
        measure(Row(scheme=None), made, prompt(), OPTIONS)


def test_steps_take_what_plain_forwards_would() -> None:
    model, ids_BT = made().float(), prompt()  # in bfloat16 two tokens may come out level
    wanted_BT = ids_BT
    for _ in range(6):
        logits_BV = model(wanted_BT, use_cache=False).logits[:, -1]
        wanted_BT = torch.cat([wanted_BT, logits_BV.argmax(-1, keepdim=True)], dim=1)
    decoder = Decoder(model, 2, 18)
    for _ in range(2):  # begun again, it gives the same
        decoder.begin(ids_BT)
        first = decoder.ids_B1.clone()
        taken = [first, *(decoder.step().clone() for _ in range(5))]
        assert torch.equal(torch.cat(taken, dim=1), wanted_BT[:, 12:])


def test_what_a_shape_does_not_allow_is_said_and_left_out(
    capsys: pytest.CaptureFixture[str], settings_left_alone: None
) -> None:
    rows = (Row(scheme=None), Row(scheme="int4", group_size=96))
    assert [row.label for row in run(rows, made, prompt(), OPTIONS)] == ["bf16"]
    assert "without int4 sym g96" in capsys.readouterr().out
    assert decode.TILED.keys() <= {"cuda", "xpu"}
