"""From a job and a model's shapes to the plan; what cannot be is refused where it was written."""

from typing import Any

import pytest

from jobs.spec import JobSpec
from orchestrator.planning import make_plan, plan_layers
from quantcore.errors import Fault
from quantcore.schemes import Scheme
from tests.samples import HIDDEN, INNER, architecture, job_spec, plan
from workers.architecture import Architecture
from workers.plan import LayerPlan, Plan, to_json


def quantized(**keys: Any) -> JobSpec:
    return job_spec(quantization={"scheme": "int4", **keys})


def faults_of(spec: JobSpec, model: Architecture | None = None) -> list[Fault]:
    return plan_layers(spec, model or architecture())[2]


def layers_of(spec: JobSpec, model: Architecture | None = None) -> dict[str, LayerPlan]:
    blocks, _, faults = plan_layers(spec, model or architecture())
    assert not faults
    groups = [group for block in blocks for group in block.groups]
    return {layer.name: layer for group in groups for layer in group.layers}


def int4(group_size: int | None = 128) -> Scheme:
    return Scheme(name="int4", group_size=group_size, zero_point="none")


def test_every_linear_has_the_jobs_scheme_and_method() -> None:
    layers = layers_of(quantized())
    assert len(layers) == 3 * 7
    assert {(layer.scheme, layer.method) for layer in layers.values()} == {(int4(), "gptq")}
    down = layers["model.layers.2.mlp.down_proj"]
    assert (down.out_features, down.in_features) == (HIDDEN, INNER)


def test_linears_that_read_one_input_stay_together() -> None:
    blocks, _, _ = plan_layers(quantized(), architecture())
    leaves = [[layer.name.split(".")[-1] for layer in g.layers] for g in blocks[0].groups]
    assert leaves == [
        ["q_proj", "k_proj", "v_proj"],
        ["o_proj"],
        ["gate_proj", "up_proj"],
        ["down_proj"],
    ]


def test_the_last_override_that_matches_decides() -> None:
    overrides = [
        {"match": "*.down_proj", "group_size": 32},
        {"match": "*.layers.1.*", "scheme": "int8"},
        {"match": "model.layers.1.mlp.down_proj", "group_size": 64},
        {"match": "*.layers.2.*", "skip": True},
        {"match": "*.layers.2.mlp.down_proj", "method": "rtn"},
    ]
    layers = layers_of(quantized(overrides=overrides))
    int8 = Scheme(name="int8", group_size=None, zero_point="none")
    assert layers["model.layers.0.mlp.down_proj"].scheme == int4(32)
    assert layers["model.layers.0.mlp.up_proj"].scheme == int4()
    assert layers["model.layers.1.mlp.up_proj"].scheme == int8
    # what earlier overrides said is not added up
    assert layers["model.layers.1.mlp.down_proj"].scheme == int4(64)
    skipped = layers["model.layers.2.mlp.up_proj"]
    assert (skipped.scheme, skipped.method) == (None, None)
    kept = layers["model.layers.2.mlp.down_proj"]
    assert (kept.scheme, kept.method) == (int4(), "rtn")


@pytest.mark.parametrize(
    ("hidden", "inner", "size", "instead"),
    [
        (192, 320, 128, "write one of 32, 64, or channel"),
        (256, 512, 100, "write one of 32, 64, 128, 256, or channel"),
        (256, 192, 128, "write one of 32, 64, or channel"),
        (192, 384, 256, "write one of 32, 64, 96, 192, or channel"),
        (96, 100, 64, "write channel"),
    ],
)
def test_a_group_size_that_divides_not_all_names_those_that_do(
    hidden: int, inner: int, size: int, instead: str
) -> None:
    """Those that divide every width under that group size, not only the first that failed."""
    (fault,) = faults_of(quantized(group_size=size), architecture(hidden=hidden, inner=inner))
    assert fault.field == "quantization.group_size"
    assert fault.message.endswith(instead)
    width = hidden if hidden % size else inner
    leaf = "self_attn.q_proj" if hidden % size else "mlp.down_proj"
    assert f"groups of {size} do not divide the {width} inputs of 'model.layers.0.{leaf}'" in (
        fault.message
    )
    offered = [int(word.strip(",")) for word in instead.split() if word.strip(",").isdigit()]
    for good in offered:
        assert not faults_of(quantized(group_size=good), architecture(hidden=hidden, inner=inner))


def test_a_group_size_is_held_to_the_widths_that_it_is_for() -> None:
    model = architecture(hidden=192, inner=320)
    overrides = [{"match": "*.down_proj", "group_size": 192}]
    (fault,) = faults_of(quantized(group_size=96, overrides=overrides), model)
    assert fault.field == "quantization.overrides.0"
    assert "'model.layers.0.mlp.down_proj': write one of 32, 64, or channel" in fault.message
    overrides = [{"match": "*.down_proj", "skip": True}]
    assert not faults_of(quantized(group_size=96, overrides=overrides), model)
    assert not faults_of(quantized(group_size="channel"), model)


@pytest.mark.parametrize(
    ("leaf", "change", "leaves"),
    [
        ("k_proj", {"skip": True}, "q_proj/k_proj/v_proj"),
        ("v_proj", {"group_size": 64}, "q_proj/k_proj/v_proj"),
        ("up_proj", {"scheme": "int8"}, "gate_proj/up_proj"),
    ],
)
def test_what_engines_fuse_must_not_be_split(
    leaf: str, change: dict[str, Any], leaves: str
) -> None:
    (fault,) = faults_of(quantized(overrides=[{"match": f"*.{leaf}", **change}]))
    assert fault.field == "quantization.overrides.0.match"
    assert f"splits {leaves} of 'model.layers.0." in fault.message


@pytest.mark.parametrize(
    "override",
    [
        {"match": "re:.*[qkv]_proj", "skip": True},
        {"match": "*.self_attn.*", "scheme": "int8"},
        {"match": "*.o_proj", "skip": True},
        {"match": "*.k_proj", "method": "rtn"},
        {"match": "*.layers.0.*", "group_size": 64},
    ],
)
def test_what_is_fused_may_be_changed_together(override: dict[str, Any]) -> None:
    assert not faults_of(quantized(overrides=[override]))


@pytest.mark.parametrize("match", ["down_proj", "*.layers.3.*", "re:layers", "*.experts.*"])
def test_an_override_for_no_layer_is_refused(match: str) -> None:
    overrides = [{"match": "*.o_proj", "skip": True}, {"match": match, "skip": True}]
    (fault,) = faults_of(quantized(overrides=overrides))
    assert fault.field == "quantization.overrides.1.match"
    assert f"'{match}' matches no layer" in fault.message
    assert "model.layers.0.self_attn.q_proj" in fault.message


@pytest.mark.parametrize("match", ["lm_head", "model.embed_tokens"])
def test_head_and_embedding_may_be_named_to_be_skipped(match: str) -> None:
    assert not faults_of(quantized(overrides=[{"match": match, "skip": True}]))


@pytest.mark.parametrize("match", ["*", "re:.*", "re:model.*|lm_head"])
def test_a_pattern_for_all_linears_is_not_for_head_and_embedding(match: str) -> None:
    overrides = [{"match": match, "group_size": 64, "method": "rtn"}]
    _, head, faults = plan_layers(quantized(overrides=overrides), architecture())
    assert (head, faults) == (None, [])


def test_the_head_is_quantized_where_an_override_names_it() -> None:
    overrides = [{"match": "lm_head", "scheme": "int8", "method": "rtn"}]
    _, head, faults = plan_layers(quantized(overrides=overrides), architecture())
    assert not faults
    assert head is not None
    assert (head.name, head.out_features, head.method) == ("lm_head", 32000, "rtn")
    assert head.scheme == Scheme(name="int8", group_size=None, zero_point="none")


@pytest.mark.parametrize(
    ("override", "tied", "field", "message"),
    [
        ({"match": "lm_head", "group_size": 64}, False, "method", "write method: rtn or hqq"),
        ({"match": "lm_head", "method": "gptq"}, False, "method", "write method: rtn or hqq"),
        ({"match": "lm_head", "method": "rtn"}, True, "match", "shares the embedding's weight"),
        ({"match": "*.embed_tokens", "method": "rtn"}, False, "match", "is an embedding"),
    ],
)
def test_heads_and_embeddings_that_cannot_be_quantized_are_refused(
    override: dict[str, Any], tied: bool, field: str, message: str
) -> None:
    (fault,) = faults_of(quantized(overrides=[override]), architecture(tied=tied))
    assert fault.field == f"quantization.overrides.0.{field}"
    assert message in fault.message


def test_groups_must_divide_the_head_too() -> None:
    overrides = [{"match": "lm_head", "group_size": 96, "method": "rtn"}]
    (fault,) = faults_of(quantized(overrides=overrides))
    assert fault.field == "quantization.overrides.0"
    assert "'lm_head'" in fault.message


def test_the_head_is_held_to_what_the_format_carries() -> None:
    head = {"match": "lm_head", "method": "rtn", "symmetric": False, "zero_point": "float"}
    fault = faults_of(quantized(overrides=[head]))[0]
    assert fault.field == "quantization.overrides.0"
    assert "output.format: native (first: 'lm_head')" in fault.message


@pytest.mark.parametrize("form", ["gptq", "gptq_v2"])
def test_gptq_takes_no_output_head(form: str) -> None:
    spec = job_spec(
        quantization={"scheme": "int4", "overrides": [{"match": "lm_head", "method": "rtn"}]},
        output={"store": "/store", "format": form},
    )
    (fault,) = faults_of(spec)
    assert fault.field == "quantization.overrides.0.match"
    assert fault.message.endswith("leave this out, or write output.format: compressed-tensors")


@pytest.mark.parametrize("match", ["*.q_proj", "*.up_proj"])
def test_gptq_models_must_not_split_what_engines_fuse_either(match: str) -> None:
    spec = job_spec(
        quantization={"scheme": "int4", "overrides": [{"match": match, "group_size": 64}]},
        output={"store": "/store", "format": "gptq"},
    )
    (fault,) = faults_of(spec)
    assert "which engines load as one matrix" in fault.message


def test_shapes_that_the_format_cannot_pack_are_refused_once() -> None:
    spec = job_spec(
        quantization={"scheme": "int4", "group_size": "channel"},
        output={"store": "/store", "format": "gptq"},
    )
    (fault,) = faults_of(spec, architecture(hidden=100))
    assert fault.field == "quantization.scheme"
    assert "packs 8 codes into a word" in fault.message
    assert "(first: 'model.layers.0.self_attn.q_proj')" in fault.message


def test_a_job_that_skips_everything_is_refused() -> None:
    (fault,) = faults_of(quantized(overrides=[{"match": "*", "skip": True}]))
    assert (fault.field, fault.message) == (
        "quantization.overrides",
        "every layer is skipped: nothing to do",
    )


def test_layers_that_the_format_does_not_have_are_refused_once() -> None:
    (fault,) = faults_of(quantized(), architecture(kind="Conv1D"))
    assert fault.field == "quantization.scheme"
    assert "no Conv1D layers" in fault.message
    assert "(first: 'model.layers.0.self_attn.q_proj')" in fault.message


@pytest.mark.parametrize("match", ["*.o_proj", "lm_head"])
def test_an_asymmetric_scheme_beside_another_is_refused(match: str) -> None:
    overrides = [{"match": match, "scheme": "int8", "symmetric": True, "method": "rtn"}]
    (fault,) = faults_of(quantized(symmetric=False, overrides=overrides))
    assert fault.field == "quantization.symmetric"
    assert not faults_of(quantized(symmetric=False, overrides=[{"match": match, "skip": True}]))


def test_faults_of_all_kinds_come_at_once() -> None:
    overrides = [
        {"match": "nothing", "skip": True},
        {"match": "*.k_proj", "skip": True},
        {"match": "lm_head", "group_size": 64},
        {"match": "*.down_proj", "group_size": 100},
    ]
    fields = {fault.field for fault in faults_of(quantized(overrides=overrides))}
    assert fields == {
        "quantization.overrides.0.match",
        "quantization.overrides.1.match",
        "quantization.overrides.2.method",
        "quantization.overrides.3",
    }


@pytest.mark.parametrize(
    ("sequences", "length", "micro_batch", "chunks"),
    [
        (1, 512, 1, 1),  # one sequence can be shared by nobody
        (8, 512, 1, 8),
        (64, 512, 4, 16),
        (512, 512, 8, 16),  # as many as the tokens of one forward allow
        (100, 64, 6, 16),
        (64, 4096, 1, 16),
        (64, 8192, 1, 16),  # longer than that: one at a time all the same
    ],
)
def test_every_chunk_has_work(sequences: int, length: int, micro_batch: int, chunks: int) -> None:
    made = plan(calibration={"text": "/t", "sequences": sequences, "length": length})
    assert (made.contract.micro_batch, made.contract.chunks) == (micro_batch, chunks)
    batches = [made.micro_batches_of(chunk, chunk + 1) for chunk in range(chunks)]
    assert all(batches)
    assert [batch for chunk in batches for batch in chunk] == list(range(made.micro_batches()))
    assert max(map(len, batches)) - min(map(len, batches)) <= 1
    assert (
        (made.micro_batches() - 1) * micro_batch < sequences <= (made.micro_batches() * micro_batch)
    )


def test_nothing_that_bits_depend_on_comes_from_the_number_of_workers() -> None:
    plans = [to_json(plan(workers={"count": count})) for count in (1, 2, 16)]
    assert plans[0] == plans[1] == plans[2]
    assert to_json(plan(workers={"threads": 2})) != plans[0]


def test_row_tiles_cover_a_stack_once() -> None:
    made: Plan = plan()
    for block in made.blocks:
        for group in block.groups:
            for stack in group.stacks():
                tiles = made.row_tiles(stack)
                rows = sum(layer.out_features for layer in stack)
                assert [row for first, last in tiles for row in range(first, last)] == list(
                    range(rows)
                )
                assert all(last - first <= made.contract.row_tile for first, last in tiles)


def test_the_plan_says_what_the_job_said() -> None:
    spec = job_spec(
        quantization={
            "scheme": "int4",
            "range": "minmax",
            "gptq": {"damping": 0.05, "act_order": False, "block_columns": 64},
        },
        compute_dtype="bfloat16",
        output={"store": "s3://bucket/jobs/"},
    )
    blocks, head, _ = plan_layers(spec, architecture())
    made = make_plan(spec, blocks, head, {"device": "cpu"})
    assert made.store == "s3://bucket/jobs/job"
    assert (made.gptq.damping, made.gptq.act_order, made.gptq.block_columns) == (0.05, False, 64)
    assert not made.search_range
    assert made.contract.compute_dtype == "bfloat16"
