"""What a linear may become: from the tables of schemes, layouts and kernels."""

import contextlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantcore.autoquant.candidates import (
    CLASSES,
    DENSE,
    Candidate,
    candidate_of,
    candidates_of,
    has_kernel,
    offers,
    refused,
    schemes_of,
    worth_timing,
)
from quantcore.autoquant.shapes import bytes_of, num_bytes, weight_of
from quantcore.errors import SpecError
from quantcore.schemes import SCHEME_KINDS, Scheme
from quantcore.tensors import Layout, QuantizedTensor, relayout
from quantcore.tensors.kernels import kernel_for, reference
from tests.quantized import FORMS, layouts_of, linear

EVERY = candidates_of(schemes_of(["all"]))


def labels(classes: list[str], features: tuple[int, int], dtype: str, device: str) -> list[str]:
    offered = worth_timing(offers(candidates_of(schemes_of(classes)), features, dtype, device))
    return [offer.candidate.label() for offer in offered]


def test_labels_are_read_back_and_no_two_are_alike() -> None:
    assert len({candidate.label() for candidate in EVERY}) == len(EVERY) > 60
    for candidate in EVERY:
        assert candidate_of(candidate.label()) == candidate
    assert candidate_of("int4 asym g96 triton_tiled") == Candidate(
        scheme=Scheme(name="int4", group_size=96, zero_point="int"), layout=Layout.TRITON_TILED
    )


@pytest.mark.parametrize(
    "label",
    [
        "",
        "int4",
        "int4 sym",
        "int4 sym g0 plain",
        "int4 sym g64",
        "int4 sym g64 rows",
        "int9 sym g64 plain",
        "int4 sym g064 plain",
        "int8_dynamic sym g64 plain",
        "float8 sym channel plain",
        "dense plain",
        "int4 sym g64 plain ",
        "int4 sym gx plain",
    ],
)
def test_what_is_no_label_is_refused(label: str) -> None:
    with pytest.raises(ValueError, match="no candidate is called"):
        candidate_of(label)


@settings(max_examples=50, deadline=None)
@given(
    words=st.lists(st.sampled_from(["int4", "sym", "g64", "plain", "channel", "", "x"]), max_size=5)
)
def test_a_label_is_read_as_it_would_be_written_or_not_at_all(words: list[str]) -> None:
    label = " ".join(words)
    with contextlib.suppress(ValueError):
        assert candidate_of(label).label() == label


def test_every_class_begins_with_the_dense_weight_and_the_default_has_int8_alone() -> None:
    assert candidates_of([]) == [DENSE]
    assert [scheme.label() for scheme in CLASSES["default"]] == [
        "int8 sym channel",
        "int8_dynamic sym channel",
    ]
    assert {scheme.name for scheme in CLASSES["all"]} == set(SCHEME_KINDS)
    for name in CLASSES:
        assert set(CLASSES[name]) <= set(CLASSES["all"])
        assert len(set(CLASSES[name])) == len(CLASSES[name])
    assert schemes_of(["default", "int4", "default"]) == [*CLASSES["default"], *CLASSES["int4"]]


def test_a_class_that_is_not_there_is_refused_with_those_that_are() -> None:
    with pytest.raises(
        SpecError, match="unknown class 'int3': write default or int4 or float8 or all"
    ):
        schemes_of(["int3"])


def test_what_is_worth_timing_on_a_gpu_and_on_a_cpu() -> None:
    assert labels(["default"], (4096, 4096), "bfloat16", "cuda") == [
        "dense",
        "int8 sym channel triton_tiled",
        "int8_dynamic sym channel plain",
    ]
    assert labels(["default"], (576, 576), "bfloat16", "cpu") == [
        "dense",
        "int8 sym channel plain",
        "int8_dynamic sym channel plain",
    ]
    assert "int4 sym g64 int4_cpu" in labels(["int4"], (576, 576), "bfloat16", "cpu")
    assert "int4 asym g64 plain" in labels(["int4"], (576, 576), "bfloat16", "cpu"), "no kernel"
    assert not any("g128" in label for label in labels(["all"], (576, 576), "bfloat16", "cpu"))


def test_a_refusal_says_why() -> None:
    wide = candidate_of("int4 sym g64 plain")
    assert refused(wide, (8, 96), "float32", "cpu") == (
        "has groups of 64, which do not divide 96 inputs"
    )
    tiled = candidate_of("int4 sym g32 tensor_core_tiled")
    assert "needs rows by 8" in (refused(tiled, (12, 96), "bfloat16", "cuda") or "")
    assert refused(DENSE, (3, 5), "float32", "cpu") is None
    with pytest.raises(ValueError, match="a dense weight has no layout"):
        Candidate(scheme=None, layout=Layout.TRITON_TILED)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scheme", FORMS, ids=Scheme.label)
def test_marks_and_refusals_are_those_of_weights_that_are_there(
    scheme: Scheme, dtype: torch.dtype
) -> None:
    """Real tensors beside rules: what can lie so, and whether a product takes the reference."""
    name = str(dtype).removeprefix("torch.")
    takes = layouts_of(scheme, dtype)
    for layout in Layout:
        candidate = Candidate(scheme=scheme, layout=layout)
        assert (refused(candidate, (32, 64), name, "cpu") is None) == (layout in takes)
        if layout in takes:
            ours = linear(scheme, 32, 64, sparse=layout == Layout.SPARSE_24, stored=dtype)
            weight = relayout(QuantizedTensor.of(ours, dtype), layout)
            runs = kernel_for(torch.ones(1, 64, dtype=dtype), weight)
            assert has_kernel(candidate, (32, 64), name, "cpu") == (runs is not reference)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("features", [(64, 256), (96, 768), (128, 100), (33, 35)])
def test_bytes_are_those_of_the_weight_as_it_lies(features: tuple[int, int], dtype: str) -> None:
    found = 0
    for device in ("cpu", "cuda"):
        for offer in offers(candidates_of(schemes_of(["all"])), features, dtype, device):
            told = bytes_of(offer.candidate, *features, dtype)
            assert told == num_bytes(weight_of(offer.candidate, *features, dtype)), offer
            found += 1
    assert found > 10
