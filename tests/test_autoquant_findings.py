"""What was found of a model: keyed by contents, kept as data, and never computed twice."""

import random
from collections.abc import Callable
from itertools import permutations
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantcore.autoquant import costs, digests
from quantcore.autoquant.digests import of_model, of_tensor, of_value
from quantcore.autoquant.divergence import HeldOut
from quantcore.autoquant.findings import Finding, Findings, merged, parse, written
from quantcore.errors import StoreError
from quantcore.schemes import Scheme
from quantcore.tensors import QuantizedTensor
from tests.test_autoquant_inplace import INT8_WINS, SCHEMES, MadeUp, ids, model, planned

ERROR = Finding(what="error", of="3f6c", under="int4 sym g64")
MASK = (1 << 64) - 1


def by_hand(words: list[int]) -> int:
    """The formula in whole numbers without end, as a signed one of 64 bits."""
    total = 0
    for place, word in enumerate(words):
        z = (word + place * 0x9E3779B97F4A7C15) & MASK
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        total = (total + (z ^ (z >> 31))) & MASK
    return total - (1 << 64) if total >> 63 else total


def test_a_digest_is_the_sum_of_its_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(0)
    words = [draw.randrange(-(1 << 63), 1 << 63) for _ in range(13)]
    tensor = torch.tensor(words)
    expected = digests.combined(torch.int64, (13,), by_hand([word & MASK for word in words]), "")
    assert of_tensor(tensor) == expected
    monkeypatch.setattr(digests, "_WORDS_AT_ONCE", 4)
    assert of_tensor(tensor) == expected


def test_a_digest_tells_what_differs_and_nothing_else() -> None:
    one = torch.randn(5, 7).bfloat16()
    seen = {of_tensor(one)}
    for place in range(one.numel()):
        other = one.clone()
        other.view(torch.int16).flatten()[place] ^= 1
        seen.add(of_tensor(other))
    assert len(seen) == one.numel() + 1, "each bit counts, the last words' too"
    others = (
        one.float(),
        one.view(torch.float16),
        one.reshape(7, 5),
        one.t(),
        one[:4],
        one.flip(0),
    )
    seen |= {of_tensor(of) for of in others}
    assert len(seen) == one.numel() + 1 + len(others)
    wide = torch.zeros(5, 20).bfloat16()
    wide[:, 3:10] = one
    assert of_tensor(wide[:, 3:10]) == of_tensor(one.clone()) == of_tensor(one)
    long = torch.cat([torch.zeros(3).bfloat16(), one.flatten()])
    assert of_tensor(long[3:].reshape(5, 7)) == of_tensor(one), "wherever it begins in memory"
    scalars = {of_tensor(torch.tensor(value)) for value in (0, 1, 0.0, True, False)}
    assert len(scalars | {of_tensor(torch.zeros(0)), of_tensor(torch.zeros(0, 1))}) == 7


def test_inputs_and_models_are_told_by_all_they_are_made_of() -> None:
    given = [ids(1), {"ids": ids(2), "use_cache": False}]
    others = ([ids(1)], [ids(1), {"ids": ids(2), "use_cache": True}], {"ids": ids(1)}, ids(1))
    assert len({of_value(of) for of in (given, *others)}) == 5
    assert of_value([ids(1), {"ids": ids(2), "use_cache": False}]) == of_value(given)
    one, other = model(), model()
    assert of_model(one, {}) == of_model(other, {})
    other.words.weight.data[0, 0] += 1
    assert of_model(one, {}) != of_model(other, {})
    wider = model()
    wider.register_buffer("more", torch.zeros(1))
    assert of_model(one, {}) != of_model(wider, {})
    planned(quantized := model(), bench=MadeUp(**INT8_WINS))
    assert isinstance(quantized.blocks[0].q_proj.weight, QuantizedTensor)
    assert of_model(one, {}) != of_model(quantized, {})


def test_nothing_is_computed_twice_and_the_plan_is_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options: dict[str, Any] = {
        "candidates": (*SCHEMES, Scheme(name="int8_static")),
        "bench": MadeUp(dense=20.0, int8=10.0, int4=5.0),
        "held_out": [ids(7)],
    }
    first = planned(model(), **options)
    findings = parse(written(first.findings))
    assert findings == first.findings
    counts = {what: sum(of.what == what for of in findings.of) for what in ("error", "divergence")}
    assert counts == {"error": 8 * 3, "divergence": 3 + 1}

    def refuse(*_: Any) -> Any:
        raise AssertionError("it is known")

    known: dict[str, Any] = {"measurements": first.measurements, "findings": findings}
    with monkeypatch.context() as patch:
        patch.setattr(costs, "output_errors", refuse)
        patch.setattr(HeldOut, "__init__", refuse)
        again = planned(model(), **options, **known)
        assert again.plan == first.plan and again.findings == first.findings
        with pytest.raises(AssertionError, match="it is known"):
            planned(model(), ids(3), **options, **known)
    asked: list[str] = []
    real = costs.output_errors
    monkeypatch.setattr(
        costs, "output_errors", lambda name, *rest: (asked.append(name), real(name, *rest))[1]
    )
    changed = model()
    changed.blocks[1].o_proj.weight.data[0, 0] += 1
    planned(changed, **options, **known)
    assert asked == ["blocks.1.o_proj"]


findings_of = st.builds(
    Findings,
    of=st.dictionaries(
        st.builds(
            Finding,
            what=st.sampled_from(["error", "divergence"]),
            of=st.sampled_from(["3f", "6c"]),
            under=st.sampled_from(["int8 sym channel", "int4 sym g64"]),
        ),
        st.floats(0, 1e9),
    ),
)


@settings(max_examples=50, deadline=None)
@given(many=st.lists(findings_of, max_size=3))
def test_findings_are_read_as_written_and_merged_in_any_order(many: list[Findings]) -> None:
    together = merged(many)
    assert parse(written(together)) == together
    for order in permutations(many):
        assert merged([together, *order]) == together == merged(order)
    for one in many:
        assert all(together.of[finding] >= value for finding, value in one.of.items())


def test_a_document_has_a_line_for_each_and_names_what_it_does_not_know() -> None:
    text = written(Findings(of={ERROR: 0.5, Finding(what="divergence", of="a", under="plan"): 2}))
    assert text.splitlines()[2] == (
        '{"what": "error", "of": "3f6c", "under": "int4 sym g64", "value": 0.5}'
    )
    for change, told in (
        (('"error"', '"errors"'), "a finding is ignored: nothing is called 'errors'"),
        (
            ("int4 sym", "int3 sym"),
            "a finding is ignored: no candidate is called 'int3 sym g64 plain'",
        ),
    ):
        read = parse(text.replace(*change))
        assert len(read.of) == 1 and read.ignored == (told,)
        assert merged([read, parse(text)]).ignored == (told,)
    auto = planned(model(), bench=MadeUp(), findings=read)
    assert auto.ignored == read.ignored


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace('"version": 1', '"version": 2'), "version 2 where this reads 1"),
        (lambda text: text[:-4], "damaged"),
        (lambda text: text.replace("0.5", "NaN"), "value: nan"),
        (lambda text: text.replace("0.5", "-0.5"), "value: -0.5"),
        (lambda text: text.replace("0.5", '"0.5"'), "value: '0.5'"),
        (lambda text: text.replace('"value"', '"worth"'), "no 'value'"),
        (lambda text: text.replace('"of": "3f6c"', '"of": 7'), "of: 7"),
        (lambda text: text.replace('"of"', '"off"'), "damaged"),
        (lambda text: text.replace("\n]", ",\n" + text.splitlines()[1] + "\n]"), "stands twice"),
        (lambda text: "[]", "damaged"),
    ],
)
def test_damage_is_one_clear_error(change: Callable[[str], str], message: str) -> None:
    text = written(Findings(of={ERROR: 0.5}))
    assert change(text) != text
    with pytest.raises(StoreError, match=message) as told:
        parse(change(text))
    assert str(told.value).startswith("findings: ")
