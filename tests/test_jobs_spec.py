"""What one field, or fields beside each other, may say."""

import json
from typing import Any

import pytest
from pydantic import ValidationError

from jobs.spec import JobSpec, Override, QuantizationSpec, WorkersSpec
from quantcore.schemes import SCHEME_KINDS, Scheme, ZeroPoint, resolve_scheme


def quantization(**keys: Any) -> QuantizationSpec:
    return QuantizationSpec.model_validate_json(json.dumps({"scheme": "int4", **keys}))


def job(**sections: Any) -> JobSpec:
    whole = {
        "name": "job",
        "model": {"path": "m"},
        "quantization": {"scheme": "int4", "method": "rtn"},
        "output": {"store": "out"},
        **sections,
    }
    return JobSpec.model_validate_json(json.dumps(whole))


def scheme(name: str, group_size: int | None, zero_point: ZeroPoint = "none") -> Scheme:
    return Scheme(name=name, group_size=group_size, zero_point=zero_point)


FLOAT_ZERO_INT8 = scheme("int8", None, "float")


@pytest.mark.parametrize("name", SCHEME_KINDS)
def test_a_scheme_has_its_usual_groups_unless_the_job_says_otherwise(name: str) -> None:
    usual = quantization(scheme=name).scheme_of()
    span = SCHEME_KINDS[name].usual_span
    assert (usual.group_size or usual.span) == span
    for span in SCHEME_KINDS[name].spans:
        size = 32 if span == "group" else span
        chosen = quantization(scheme=name, group_size=size).scheme_of()
        assert (chosen.span, chosen.group_size) == (span, 32 if span == "group" else None)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"scheme": "int8_dynamic", "group_size": 64}, "write group_size: channel"),
        ({"scheme": "int8_dynamic", "symmetric": False}, "write symmetric: true"),
        (
            {"overrides": [{"match": "a", "scheme": "int8_dynamic", "group_size": 64}]},
            "write group_size: channel",
        ),
        (
            {"overrides": [{"match": "a", "scheme": "int8_dynamic", "symmetric": False}]},
            "write symmetric: true",
        ),
        ({"scheme": "float8", "group_size": 64}, "write group_size: channel or tensor"),
        ({"scheme": "int4", "group_size": "tensor"}, "write group_size: a number or channel"),
        ({"scheme": "float8", "symmetric": False}, "write symmetric: true"),
        ({"zero_point": "float"}, "write symmetric: false"),
        ({"overrides": [{"match": "a", "zero_point": "int", "scheme": "float8"}]}, "write symm"),
        ({"scheme": "fp3"}, "unknown scheme 'fp3'"),
        ({"group_size": -32}, "greater than 0"),
        ({"group_size": "row"}, "channel"),
        ({"method": "awq"}, "'rtn', 'gptq', 'hqq', 'smoothquant' or 'plan'"),
        ({"range": "mse"}, "'search' or 'minmax'"),
    ],
)
def test_forms_that_a_scheme_does_not_have_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        quantization(**keys)


@pytest.mark.parametrize(
    ("base", "override", "expected"),
    [
        # what an override does not name stays as the job has it
        ({"group_size": 64}, {"symmetric": False}, scheme("int4", 64, "int")),
        ({"symmetric": False}, {"group_size": 32}, scheme("int4", 32, "int")),
        ({"group_size": 64}, {"group_size": "channel"}, scheme("int4", None)),
        ({"group_size": 64}, {"method": "rtn"}, scheme("int4", 64)),
        ({"group_size": 64}, {"scheme": "int4"}, scheme("int4", 64)),
        # another scheme starts from its own usual groups
        ({"group_size": 64}, {"scheme": "int8"}, scheme("int8", None)),
        ({"symmetric": False}, {"scheme": "int8"}, scheme("int8", None, "int")),
        ({"symmetric": False}, {"scheme": "int8_dynamic"}, scheme("int8_dynamic", None)),
        ({"symmetric": False, "zero_point": "float"}, {"scheme": "int8"}, FLOAT_ZERO_INT8),
        ({"symmetric": False, "zero_point": "float"}, {"symmetric": True}, scheme("int4", 128)),
        ({"symmetric": False, "zero_point": "float"}, {"scheme": "float8"}, scheme("float8", None)),
        ({"symmetric": False}, {"zero_point": "float"}, scheme("int4", 128, "float")),
        ({}, {"scheme": "int8", "zero_point": "float"}, FLOAT_ZERO_INT8),
        ({"scheme": "int8"}, {"scheme": "int4"}, scheme("int4", 128)),
        ({}, {"scheme": "int8", "group_size": 32, "symmetric": False}, scheme("int8", 32, "int")),
    ],
)
def test_an_override_changes_what_it_names(
    base: dict[str, Any], override: dict[str, Any], expected: Scheme
) -> None:
    spec = quantization(**base, overrides=[{"match": "*", **override}])
    assert spec.with_override(spec.overrides[0]) == expected


@pytest.mark.parametrize("says", [{}, {"skip": False}, {"scheme": None, "method": None}])
def test_an_override_must_say_something(says: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="changes nothing"):
        Override.model_validate({"match": "*", **says})


@pytest.mark.parametrize(
    "also", [{"scheme": "int8"}, {"group_size": 32}, {"symmetric": True}, {"method": "rtn"}]
)
def test_a_skipped_layer_has_nothing_else_said_of_it(also: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="drop skip or the other keys"):
        Override.model_validate({"match": "*", "skip": True, **also})


@pytest.mark.parametrize("overrides", [[], [{"match": "a", "method": "rtn"}]])
def test_gptq_needs_texts(overrides: list[dict[str, Any]]) -> None:
    section = {"scheme": "int4", "method": "gptq", "overrides": overrides}
    with pytest.raises(ValidationError, match="add a calibration section, or write rtn or hqq"):
        job(quantization=section)
    assert job(quantization=section, calibration={"text": "t"}).calibration is not None


PLANNED = {"method": "plan", "plan": {"path": "plan.json"}}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({**PLANNED, "plan": {"path": "p", "candidates": ["int4"]}}, "made already: drop cand"),
        ({**PLANNED, "plan": {"candidates": []}}, "candidates: none: write default"),
        (
            {**PLANNED, "plan": {"profile": "decode_1", "calls": [{"tokens": 1}]}},
            "calls are a profile of their own",
        ),
        ({"scheme": "int8", "plan": {"path": "p"}}, "plan is for method: plan"),
        ({**PLANNED, "scheme": "int4"}, "says the scheme of every linear: drop this key"),
        ({**PLANNED, "group_size": 32}, "drop group_size, symmetric, zero_point"),
        ({**PLANNED, "symmetric": False}, "drop group_size, symmetric, zero_point"),
        ({**PLANNED, "plan": {"path": ""}}, "at least 1 character"),
        ({**PLANNED, "plan": {"path": "gs://b/p"}}, "write a file, or s3://bucket/path/plan.json"),
        ({**PLANNED, "plan": {"path": "s3://k:s@b/p"}}, "keep credentials out of the job file"),
        ({**PLANNED, "plan": {"path": "p", "rounding": "smoothquant"}}, "'rtn', 'gptq' or 'hqq'"),
        (
            {**PLANNED, "overrides": [{"match": "a", "group_size": 32}]},
            "overrides.0: group_size, .* a plan has many: write scheme beside them",
        ),
        ({**PLANNED, "overrides": [{"match": "a", "method": "plan"}]}, "'hqq' or 'smoothquant'"),
        (
            {**PLANNED, "overrides": [{"match": "a", "scheme": "float8", "method": "hqq"}]},
            "hqq fits grids of whole codes",
        ),
    ],
)
def test_what_does_not_go_with_a_plan_is_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        QuantizationSpec.model_validate_json(json.dumps(keys))


def test_a_plan_is_rounded_as_jobs_are() -> None:
    texts = {"text": "t"}
    assert (
        job(quantization={"method": "plan"}, calibration=texts).quantization.planning.path is None
    )
    assert job(quantization=PLANNED, calibration=texts).quantization.usual_method == "gptq"
    with pytest.raises(ValidationError, match="add a calibration section, or write rtn or hqq"):
        job(quantization=PLANNED)
    plain = {**PLANNED, "plan": {"path": "plan.json", "rounding": "rtn"}}
    spec = job(quantization=plain)
    assert spec.quantization.usual_method == "rtn"
    assert JobSpec.model_validate_json(spec.model_dump_json()) == spec
    with pytest.raises(ValidationError, match="add a calibration section"):
        job(quantization={**plain, "overrides": [{"match": "a", "method": "gptq"}]})


def test_gptq_for_one_layer_needs_texts_too() -> None:
    overrides = [{"match": "a", "method": "gptq"}]
    with pytest.raises(ValidationError, match="add a calibration section"):
        job(quantization={"scheme": "int4", "method": "rtn", "overrides": overrides})
    assert job().calibration is None


@pytest.mark.parametrize("sources", [{}, {"text": "t", "jsonl": "j"}])
def test_calibration_has_one_source(sources: dict[str, str]) -> None:
    with pytest.raises(ValidationError, match="either text or jsonl"):
        job(calibration=sources)


@pytest.mark.parametrize(
    ("memory", "num_bytes"),
    [("512KiB", 2**19), ("1.5 MiB", 3 * 2**19), ("16GiB", 2**34), ("2TiB", 2**41)],
)
def test_memory_is_read_in_binary_units(memory: str, num_bytes: int) -> None:
    assert WorkersSpec(memory=memory).memory_bytes() == num_bytes


@pytest.mark.parametrize("memory", ["16", "16GB", "GiB", "-1GiB", "16 gib", "1e3MiB"])
def test_memory_without_such_a_unit_is_refused(memory: str) -> None:
    with pytest.raises(ValidationError):
        WorkersSpec(memory=memory)
    assert WorkersSpec().memory_bytes() is None


def test_a_spec_does_not_change_once_it_is_made() -> None:
    spec = job()
    with pytest.raises(ValidationError, match="frozen"):
        spec.name = "other"
    with pytest.raises(ValidationError, match="frozen"):
        spec.quantization.gptq.damping = 0.5


def test_a_spec_survives_its_own_json() -> None:
    spec = job(
        quantization={
            "scheme": "int8",
            "group_size": 64,
            "overrides": [{"match": "a", "skip": True}],
        },
        calibration={"jsonl": "c.jsonl", "field": "ids"},
        evaluation={"tasks": ["arc_easy"], "baselines": ["original", "rtn"]},
    )
    assert JobSpec.model_validate_json(spec.model_dump_json()) == spec


@pytest.mark.parametrize("name", SCHEME_KINDS)
def test_resolving_a_resolved_scheme_changes_nothing(name: str) -> None:
    once = resolve_scheme(name)
    assert resolve_scheme(name, once.group_size or once.span, once.symmetric) == once
