"""Plans as documents: read as written, checked, compared, explained, refused elsewhere."""

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings

from quantcore.autoquant.choice import Budgets, choose
from quantcore.autoquant.document import (
    Check,
    Plan,
    file_name,
    parse,
    refuse_other_hardware,
    written,
)
from quantcore.autoquant.front import front, within
from quantcore.autoquant.options import PROFILES, Layer
from quantcore.autoquant.telling import compared, explained
from quantcore.errors import ResourceError, SpecError
from tests.plans import H200, LAYERS
from tests.test_autoquant_exact import problems


def planned(layers: list[Layer] = LAYERS, budgets: Budgets = Budgets(error=2)) -> Plan:  # noqa: B008
    return Plan(
        hardware=H200,
        profile=PROFILES["mix"],
        choice=choose(layers, "time", budgets),
        front=front(layers, budgets.num_bytes),
        measured=tuple(sorted(layers, key=lambda layer: layer.name)),
        shapes={linear: (32, 64) for layer in layers for linear in layer.linears},
    )


@settings(max_examples=20, deadline=None)
@given(layers=problems())
def test_a_plan_is_read_as_it_was_written(layers: list[Layer]) -> None:
    plan = planned(layers, Budgets())
    text = written(plan)
    assert parse(text) == plan
    assert written(parse(text)) == text


def test_a_plan_says_what_each_linear_becomes_with_a_line_for_each_layer() -> None:
    plan = planned()
    assert plan.labels() == {
        "block.o": "float8 channel plain",
        "block.q": "int8 sym channel plain",
        "block.k": "int8 sym channel plain",
        "block.v": "int8 sym channel plain",
    }
    document = json.loads(written(plan))
    assert document["totals"] == {"time_us": 16.25, "num_bytes": 32, "error": 1.25}
    assert document["profile"] == {"name": "mix", "calls": {"1": 128, "16": 128, "2048": 1}}
    (line,) = [
        line for line in written(plan).splitlines() if line.startswith('{"layer": "block.o"')
    ]
    assert json.loads(line.rstrip(","))["runner_up"] == {
        "label": "int8 sym channel plain",
        "more_us": -0.25,
        "more_bytes": 0,
        "more_error": 0.5,
    }
    assert file_name(H200) == "plan-NVIDIA_H200.json"


def test_checks_are_told_as_predicted_and_measured_and_may_be_missing() -> None:
    plan = replace(
        planned(),
        checks=(
            Check(plan="int8 sym channel", summed=2.0, predicted=None, measured=0.5),
            Check(plan="chosen", summed=4.0, predicted=1.25, measured=1.5),
        ),
    )
    document = json.loads(written(plan))
    assert document["checks"][1] == {
        "plan": "chosen",
        "summed": 4.0,
        "predicted": 1.25,
        "measured": 1.5,
    }
    assert parse(written(plan)) == plan
    del document["checks"]
    assert parse(json.dumps(document)) == planned()


def test_another_budget_is_chosen_from_a_plan_that_was_read() -> None:
    point = within(parse(written(planned())).front, Budgets(error=0.1))
    assert point is not None
    assert point.totals.error == 0
    assert point.labels == ("dense", "dense")


def test_a_plan_of_another_kind_is_refused_unless_allowed() -> None:
    plan, other = planned(), replace(H200, name="NVIDIA L40S")
    refuse_other_hardware(plan, H200)
    refuse_other_hardware(plan, other, allowed=True)
    with pytest.raises(
        ResourceError, match=r"plan: made for NVIDIA H200, .* this is NVIDIA L40S, "
    ):
        refuse_other_hardware(plan, other)
    with pytest.raises(ResourceError, match=r"torch 2.11.0, .* torch 2.12.0, "):
        refuse_other_hardware(plan, replace(H200, torch="2.12.0"))


def test_what_differs_between_plans_is_told_with_what_ties() -> None:
    one = planned()
    same = compared(one, one)
    assert same["layers"] == []
    assert same["layers_alike"] == 2
    fast = planned(budgets=Budgets(num_bytes=32, error=1.8))
    tied = replace(
        fast,
        hardware=replace(H200, driver="580.2"),
        profile=PROFILES["decode_1"],
        choice=choose(
            [LAYERS[0], replace(LAYERS[1], options=LAYERS[1].options[2:])], "time", Budgets(error=2)
        ),
    )
    facts = compared(fast, tied)
    assert facts["hardware"] == [
        "NVIDIA H200, driver 570.1, torch 2.11.0, triton 3.6.0, kernels a:1",
        "NVIDIA H200, driver 580.2, torch 2.11.0, triton 3.6.0, kernels a:1",
    ]
    assert facts["profile"] == [
        "mix (128 x 1 tokens + 128 x 16 tokens + 1 x 2048 tokens)",
        "decode_1 (1 x 1 tokens)",
    ]
    assert facts["budgets"] == [{"bytes": 32, "error": 1.8}, {"error": 2}]
    assert [total["time_us"] for total in facts["totals"]] == [16.25, 16]
    (row,) = facts["layers"]
    assert row["candidate"] == ["float8 channel plain", "int8 sym channel plain"]
    assert row["tie"] is True


def test_a_layer_is_explained_by_its_name_or_by_a_linear_of_it() -> None:
    plan = planned()
    alone = explained(plan, "block.o")
    assert alone["candidate"] == "float8 channel plain"
    assert alone["ties"] == ["int8 sym channel plain"]
    assert alone["share_of_time"] == pytest.approx(4.25 / 16.25)
    assert alone["runner_up"] == {
        "label": "int8 sym channel plain",
        "more_us": -0.25,
        "more_bytes": 0,
        "more_error": 0.5,
    }
    shared = explained(plan, "block.k")
    assert shared == explained(plan, "block.qkv")
    assert shared["linears"] == ["block.q", "block.k", "block.v"]
    assert shared["runner_up"]["label"] == "dense"
    with pytest.raises(SpecError, match=r"the plan has no layer 'block.x': write one of its 2, as"):
        explained(plan, "block.x")


def _set(document: Any, path: str, value: Any) -> None:
    *above, last = path.split(".")
    for key in above:
        document = document[int(key) if key.isdecimal() else key]
    document[int(last) if last.isdecimal() else last] = value


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("version", 2, "version 2 where this reads 1"),
        ("hardware.name", 7, "name: 7 is not text"),
        ("hardware.gpu", "x", "gpu"),
        ("profile.calls", {"one": 1}, "invalid literal"),
        ("profile.calls", {"0": 1}, "1 calls? of 0 tokens|calls of 0 tokens"),
        ("objective", "speed", "'speed' is not time or error"),
        ("budgets.error", -1, "budget of error"),
        ("budgets.speed", 1, "speed"),
        ("correction", "1", "'1' is not a finite number"),
        ("totals.time_us", 1.0, "totals.time_us: 1.0 where the layers add up to 16.25"),
        ("totals.num_bytes", 31, "totals.num_bytes: 31"),
        ("totals.error", float("nan"), "not a finite number"),
        ("layers.0.candidate", "int3", "no candidate is called 'int3'"),
        ("layers.0.ties", ["int3"], "no candidate is called 'int3'"),
        ("layers.0.linears", ["block.q"], "a linear that stands in two of them"),
        ("layers.0.num_bytes", 8.5, "8.5 is not a whole number"),
        ("layers.0.layer", "", "'' is not a name"),
        ("layers.0.runner_up", {}, "no 'label'"),
        ("layers.0", 1, "damaged"),
        ("layers", [], "layers: none"),
        ("uniforms.0.label", "x", "no candidate is called 'x'"),
        ("front.0.picks", [99, 0], "99 is no candidate's number"),
        ("front.0.picks", [-1, 0], "-1 is no candidate's number"),
        ("front.0.picks", [0], "not one candidate for each layer"),
        ("front", None, "damaged"),
        ("checks", [{"plan": "chosen"}], "no 'predicted'"),
        ("checks", [{"plan": "", "summed": 1, "predicted": 1, "measured": 1}], "not a name"),
        ("options.0.options.0.0", 99, "99 is no candidate's number"),
        ("options.0.options.0.4", 8.5, "8.5 is not a whole number"),
        ("options.0.options.0.1", 99, "must be finite numbers"),
        ("options.0.options.0", [0, 1], "damaged"),
        ("options.0.of", "block.x", "options: they are not those of the layers"),
        ("options", [], None),
        ("layers.0.shapes", [None], None),
        ("layers.0.shapes", [[32, 0]], "is no linear's shape"),
        ("layers.0.shapes", [], "damaged"),
    ],
)
def test_a_document_that_is_damaged_is_one_clear_error(
    path: str, value: Any, message: str | None
) -> None:
    document = json.loads(written(planned()))
    _set(document, path, value)
    if message is None:  # may be left out
        parse(json.dumps(document))
        return
    with pytest.raises(SpecError, match=message):
        parse(json.dumps(document))


def test_a_choice_that_is_none_of_the_options_is_damage() -> None:
    plan = planned()
    other = replace(plan, measured=(replace(plan.measured[0], options=LAYERS[1].options[:1]),))
    with pytest.raises(SpecError, match="options: they are not those of the layers"):
        parse(written(other))  # one line where there are two layers
    other = replace(plan, measured=(other.measured[0], plan.measured[1]))
    with pytest.raises(
        SpecError, match=r"options: 'block\.o' has none with what it was chosen for"
    ):
        parse(written(other))


def test_text_that_ends_early_is_damaged() -> None:
    text = written(planned())
    for end in range(0, len(text) - 2, 97):
        with pytest.raises(SpecError, match="plan: damaged"):
            parse(text[:end])
