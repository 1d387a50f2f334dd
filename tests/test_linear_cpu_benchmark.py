"""The benchmark of linears on a CPU at a size of nothing: what it counts, and its gate."""

import pytest
import torch
from torch import Tensor

from tests.benchmarks import linear_cpu
from tests.benchmarks.linear_cpu import ROWS, measured, table


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_cpu, "ROTATED_BYTES", 1)
    monkeypatch.setattr("quantcore.quantize.recommended_inductor_settings", lambda: None)


@torch.no_grad()
def test_every_row_is_measured_beside_bfloat16() -> None:
    figures = measured(64, 128, (1, 3), False, 0.0)
    assert [(f.label, f.tokens) for f in figures] == [
        (row.label, tokens) for tokens in (1, 3) for row in ROWS
    ]
    found = {f.label: f.weight_bytes for f in figures}
    assert found["bf16"] == 2 * 64 * 128
    assert found["int8"] == 64 * 128 + 2 * 64
    assert found["int4 g64"] == 64 * 128 // 2 + 4 * 64 * 2  # scale and zero point
    lines = table(figures).splitlines()[2:]
    assert [line.endswith(" | 1.00 |") for line in lines[:: len(ROWS)]] == [True, True]


@torch.no_grad()
def test_a_kernel_that_is_wrong_does_not_pass_the_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(x_TI: Tensor, weight: Tensor, bias_O: Tensor | None) -> Tensor:
        return x_TI[:, :64] * 0

    monkeypatch.setattr("quantcore.tensors.operators.multiply", wrong)
    with pytest.raises(AssertionError, match="int8 of 1 tokens is off"):
        measured(64, 128, (1,), False, 0.0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--shapes", "4096"], "4096: write rows by 16 and columns by 128, as 4096x14336"),
        (["--shapes", "0x128"], "0: write a number of 1 or more"),
        (["--shapes", "64x100"], "64x100: write rows by 16 and columns by 128"),
        (["--tokens", "0"], "0: write a number of 1 or more"),
        (["--json", "nowhere/out.json"], "nowhere/out.json: write a file's name in a folder"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        linear_cpu.main(arguments)
    assert words in capsys.readouterr().err
