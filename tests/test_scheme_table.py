"""The table of schemes: every row of it from a job file, and what is said of each."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from orchestrator.checks import check
from orchestrator.driver import run_job
from orchestrator.executors import InProcessExecutor
from orchestrator.fetch import fetch
from orchestrator.loop import Observer
from quantcore.schemes import FloatGrid, Scheme
from tests.benchmarks import scheme_table
from tests.benchmarks.perplexity import perplexity, token_losses
from tests.benchmarks.scheme_rows import Pair, Row, pairs, rows
from tests.benchmarks.verdicts import judge
from tests.conftest import save_model
from tests.test_orchestrator_job import JobFile, run_here
from workers.loading import load
from workers.store import open_store

ROWS = {row.name: row for row in rows()}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small llama whose widths all the groups of the table divide, with loud channels."""
    sizes = {"hidden_size": 192, "head_dim": 48, "intermediate_size": 384}
    shape = {**sizes, "num_hidden_layers": 1}
    folder = save_model("llama", tmp_path_factory.mktemp("table"), shape=shape)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("layernorm.weight"):
            tensor[[5, 40]] *= 20
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def bits_by_hand(scheme: Scheme, widths: list[tuple[int, int]], method: str) -> float:
    """Of linears (out, in): codes, float32 scales, zero points of 8 bits or float32."""
    total = 0.0
    for rows_, width in widths:
        groups = 1 if scheme.per_tensor else rows_ * (width // (scheme.group_size or width))
        zero = {"none": 0, "int": 8, "float": 32}[scheme.zero_point]
        total += rows_ * width * scheme.bits + groups * (32 + zero) + 32 * scheme.static
        total += 32 * width if method == "smoothquant inputs" and width == 384 else 0
    return total / sum(rows_ * width for rows_, width in widths)


@pytest.mark.parametrize("row", ROWS.values(), ids=list(ROWS))
def test_every_row_ends_in_a_model_that_computes(
    row: Row, model: Path, text_file: Path, job_file: JobFile, tmp_path: Path
) -> None:
    prepared = check(
        job_file(
            model={"path": str(model)},
            quantization=dict(row.quantization),
            calibration={"text": str(text_file), "sequences": 4, "length": 32},
            output={"store": str(tmp_path / "store"), "format": "native"},
        )
    )
    result = run_job(prepared, lambda plan: InProcessExecutor(plan, ["cpu"]), Observer())
    store, lines = open_store(result.store), result.report["layers"]
    assert len(lines) == 7 and not result.report["fallbacks"]
    ids_BL = torch.arange(2, 30)[None]
    fetch(store, tmp_path / "out")
    with torch.no_grad():
        served = load(tmp_path / "out", torch.float32)(ids_BL).logits
        original = load(model, torch.float32)(ids_BL).logits
    assert 0 < (served - original).norm() / original.norm() < 0.8

    coarse = row.scheme is None or row.scheme.bits == 4
    float8 = row.scheme is not None and isinstance(row.scheme.grid, FloatGrid)
    most = 0.3 if coarse else 0.06 if float8 else 0.04
    assert all(0 < line["relative_output_error"] < 2 * most for line in lines)
    assert all(0 < error < most for error in scheme_table.weight_errors(prepared, store))
    if row.scheme is not None and row.method != "smoothquant inputs":
        layers = [layer for block in prepared.plan.blocks for layer in block.quantized()]
        widths = [(layer.out_features, layer.in_features) for layer in layers]
        by_hand = bits_by_hand(row.scheme, widths, row.method)
        assert scheme_table.stored_bits(prepared, store) == pytest.approx(by_hand, rel=1e-12)


def test_what_smoothing_left_on_inputs_is_counted(
    model: Path, job_file: JobFile, tmp_path: Path
) -> None:
    bits = {}
    for method in ("smoothquant", "smoothquant inputs"):
        row = ROWS[f"int8_dynamic sym channel {method}"]
        job = job_file(
            method.replace(" ", "-"),
            model={"path": str(model)},
            quantization=dict(row.quantization),
            output={"store": str(tmp_path / "store"), "format": "native"},
        )
        store = open_store(run_here(job).store)
        bits[method] = scheme_table.stored_bits(check(job), store)
    # o_proj and down_proj have a float32 factor for each input
    weights = 192 * (192 + 96 + 96 + 192 + 3 * 384)
    more = bits["smoothquant inputs"] - bits["smoothquant"]
    assert more == pytest.approx(32 * (192 + 384) / weights)


def test_names_are_distinct_and_pairs_are_of_rows() -> None:
    assert len(ROWS) == len(rows())
    assert len({(pair.better, pair.worse) for pair in pairs()}) == len(pairs())
    for pair in pairs():
        assert pair.better in ROWS and pair.worse in ROWS
    claims = {pair.claim for pair in pairs()}
    assert {"gptq below rtn", "smoothquant below rtn", "finer groups below coarser"} <= claims


def result(losses: list[float], output_error: float) -> dict[str, Any]:
    return {"losses": losses, "output_error": output_error}


def test_an_order_is_kept_level_or_broken() -> None:
    base = [3.0 + 0.1 * (n % 5) for n in range(64)]
    measured = {
        "base": result(base, 0.2),
        "lower": result([loss - 0.01 for loss in base], 0.1),
        "noisy": result([loss + 0.1 * (-1) ** n + 0.01 for n, loss in enumerate(base)], 0.3),
        "higher": result([loss + 0.01 for loss in base], 0.2),
    }
    claims = [Pair(name, "base", "a claim") for name in ("lower", "noisy", "higher", "absent")]
    found = {verdict.pair.better: verdict for verdict in judge(claims, measured)}
    assert {name: verdict.loss for name, verdict in found.items()} == {
        "lower": "holds",
        "noisy": "level",
        "higher": "broken",
    }
    assert found["noisy"].difference == pytest.approx(0.01)
    assert found["noisy"].standard_error == pytest.approx(0.1 / 63**0.5)
    assert [found[name].output_error for name in found] == [True, False, True]


def test_perplexity_is_that_of_windows_without_their_first_tokens(model: Path) -> None:
    served = load(model, torch.float32)
    ids = torch.randint(2, 320, (128,), generator=torch.Generator().manual_seed(2)).tolist()
    losses = token_losses(served, ids, count=128, width=64)
    assert losses.shape == (2, 63)
    with torch.no_grad():
        logits = served(torch.tensor(ids[64:])[None]).logits[0].double()
    probabilities = logits.softmax(-1)
    assert losses[1, 10] == pytest.approx(-probabilities[10, ids[64 + 11]].log().item(), rel=1e-4)
    mean = losses.mean().exp().item()
    assert perplexity(served, ids, count=128, width=64) == pytest.approx(mean)


@pytest.fixture
def table(
    model: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., dict[str, Any]]:
    """Run the command; the figures it leaves."""

    def run(*more: str, sequences: int = 8) -> dict[str, Any]:
        options = {
            "--model": model,
            "--calibration": text_file,
            "--evaluation": text_file,
            "--json": tmp_path / "table.json",
            "--markdown": tmp_path / "table.md",
            "--work": tmp_path / "work",
            "--sequences": sequences,
            "--length": 32,
            "--tokens": 1024,
            "--threads": 1,
        }
        words = [str(word) for option in options.items() for word in option]
        monkeypatch.setattr(sys, "argv", ["scheme_table", *words, *more])
        scheme_table.main()
        figures: dict[str, Any] = json.loads((tmp_path / "table.json").read_text())
        return figures

    return run


@pytest.mark.parametrize("calibration", [[], ["--shared"]], ids=["own", "shared"])
def test_the_command_does_no_row_twice(
    table: Callable[..., dict[str, Any]],
    calibration: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    name = "int4 sym g64"
    first = table("--rows", f"{name} rtn", *calibration)
    assert set(first["rows"]) == {"original", f"{name} rtn"}
    two = ("--rows", f"{name} rtn", f"{name} gptq")
    both = table(*two, *calibration)
    assert both["rows"][f"{name} rtn"] == first["rows"][f"{name} rtn"]
    monkeypatch.setattr(scheme_table, "run_job", None)
    assert table(*two, *calibration)["rows"] == both["rows"]
    gptq, rtn = both["rows"][f"{name} gptq"], both["rows"][f"{name} rtn"]
    assert gptq["output_error"] < rtn["output_error"]
    assert gptq["weight_error"] > rtn["weight_error"]
    assert gptq["bits"] == rtn["bits"] == 4.5
    markdown = (tmp_path / "table.md").read_text()
    assert markdown in capsys.readouterr().out
    assert f"| {name} | gptq | 4.50 | {gptq['perplexity']:.2f} |" in markdown
    assert f"{name} gptq, {name} rtn" in markdown or "1 of 1 pairs keep to the order" in markdown


def test_rows_of_another_protocol_are_not_added_to(
    table: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    table("--rows", "float8 channel rtn")
    with pytest.raises(SystemExit, match=r"sequences = \[8, 32\], not \[4, 32\]"):
        table("--rows", "float8 channel rtn", sequences=4)
    with pytest.raises(SystemExit, match=r"no row is like 'int3\*'; there are:\nint8 sym"):
        table("--rows", "int3*")
