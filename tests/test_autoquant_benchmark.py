"""The benchmark of plans on a GPU at a size of nothing, on a CPU: what it makes, runs and tells."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from quantcore.autoquant.choice import Budgets
from quantcore.autoquant.document import parse
from quantcore.autoquant.finalists import Stage
from quantcore.autoquant.race import Effort
from tests.benchmarks import autoquant_gpu, plan_runs
from tests.benchmarks.autoquant_gpu import Row, agreement, slower, table
from tests.plans import chosen_from, layer, option

ARGUMENTS = (
    "--device cpu --shape tiny --layers 1 --prompt 24 --steps 2 --cache 16 --record 32 "
    "--held-out 16 --candidates default --profiles decode_1 mix --repeats 2 --seconds 0.002 "
    "--prove decode_1"
)
BETWEEN = ["--between", "int8 sym channel", "int8_dynamic sym channel"]


@pytest.fixture
def settings_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile's settings are for the whole process, where other tests compile."""
    for module in ("inplace", "swapping"):
        where = f"quantcore.autoquant.{module}.recommended_inductor_settings"
        monkeypatch.setattr(where, lambda: None)


@pytest.mark.usefixtures("settings_left_alone")
def test_plans_are_made_cached_proven_and_run_beside_uniform_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    more = ["--json", str(out), "--plans", str(tmp_path / "plans")]
    short = partial(Stage, effort=Effort(spread=1.0, seconds=0.01))
    monkeypatch.setattr("quantcore.autoquant.inplace.Stage", short)
    monkeypatch.setattr(plan_runs, "Careful", partial(plan_runs.Careful, rotated_bytes=1 << 20))
    monkeypatch.setattr("sys.argv", ["autoquant_gpu", *ARGUMENTS.split(), *BETWEEN, *more])
    autoquant_gpu.main()
    facts = json.loads(out.read_text())
    kinds = {name.split()[0] for name in facts["seconds"]}
    assert kinds == {"cold", "cached", "again", "budget", "decode_1,"}
    assert set(facts["agreement"]) == {"decode_1", "mix"}
    assert [end["plan"] for end in facts["ends"]["decode_1"] if end["kept"]]
    rows = {(row["profile"], row["plan"]): row for row in facts["rows"]}
    assert {"dense", "dense again", "decode_1", "decode_1, proven"} <= {
        plan for profile, plan in rows if profile == "decode_1"
    }
    assert ("mix", "decode_1") not in rows, "a plan is told for its own calls"
    dense = rows["mix", "dense"]
    assert dense["predicted_ms"] == pytest.approx(dense["measured_ms"])
    plans = {path.stem: parse(path.read_text()) for path in (tmp_path / "plans").iterdir()}
    assert len(plans) == 2 * 4 + 1 and plans["decode-1--proven"].ends
    told = capsys.readouterr().out
    assert told.count("'apart': {}}, 0 found anew") == 2


def test_layers_that_differ_are_told_with_those_that_tie() -> None:
    near = [option("dense", 8, 16, 0), option("int8 sym channel plain", 4, 8, 1, noise=0.5)]
    near.append(option("float8 channel plain", 4.25, 8, 0.5, noise=0.5))
    far = [option("dense", 9, 16, 0), option("int8 sym channel plain", 4, 8, 1)]
    one = chosen_from([layer("a", *near), layer("b", *far)], "time", Budgets())
    other = chosen_from([layer("a", *near[:2]), layer("b", far[0])], "time", Budgets())
    assert agreement(one, one)["agree"] == 2
    assert agreement(one, other) == {
        "layers": 2,
        "agree": 0,
        "ties": 1,
        "apart": {
            "float8 channel plain -> int8 sym channel plain": 1,
            "int8 sym channel plain -> dense": 1,
        },
    }


def test_a_plan_that_is_beaten_by_what_fits_its_budget_is_named() -> None:
    plan = Row(
        profile="mix",
        plan="mix, 0.5 nats",
        predicted_ms=9.0,
        measured_ms=10.0,
        low_ms=9.9,
        high_ms=10.1,
        linear_bytes=1,
        error=0.4,
    )
    uniform = replace(plan, plan="int8", predicted_ms=7.5, measured_ms=8.0, low_ms=7.9, high_ms=8.1)
    past = replace(uniform, plan="int4", error=0.6)
    near = replace(uniform, plan="dense", high_ms=9.95, predicted_ms=None)
    assert slower([plan, past, near]) == []
    assert slower([plan, uniform, past]) == ["mix, 0.5 nats is 25.0% slower than int8"]
    same = replace(plan, plan="int4 too", measured_ms=9.8, low_ms=9.7, high_ms=9.85)
    assert slower([plan, same]) == ["mix, 0.5 nats is int4 too: one plan, measured 2.0% apart"]
    lines = table([plan, near]).splitlines()
    assert "| -10.0% |" in lines[2] and "| lost |" in lines[3]
