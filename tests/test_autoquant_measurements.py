"""Measurements as data: read as they were written, merged in any order, and never misused."""

import json
from dataclasses import replace
from itertools import permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from quantkernels.launches import VERSIONS

from quantcore.autoquant.candidates import candidate_of
from quantcore.autoquant.measurements import (
    HardwareKind,
    Measurements,
    Product,
    Timing,
    merged,
    parse,
    written,
)
from quantcore.autoquant.options import PROFILES, Profile, Time, profiled
from quantcore.errors import SpecError, StoreError

H200 = HardwareKind(
    device="cuda", name="NVIDIA H200", driver="570.1", torch="2.11.0", triton="3.6.0", kernels="a:1"
)
CPU = HardwareKind(device="cpu", name="Some CPU", torch="2.13.0", kernels="a:1", threads=2)
PRODUCT = Product(
    candidate=candidate_of("int4 sym g128 triton_tiled"),
    dtype="bfloat16",
    rows=4096,
    columns=4096,
    tokens=1,
)
TIMING = Timing(median_us=10.0, low_us=9.5, high_us=10.5, repeats=30)

products = st.builds(
    Product,
    candidate=st.sampled_from(["dense", "int8 sym channel plain"]).map(candidate_of),
    dtype=st.sampled_from(["bfloat16", "float32"]),
    rows=st.sampled_from([8, 16]),
    columns=st.just(8),
    tokens=st.sampled_from([1, 2048]),
)
timings = st.builds(
    lambda times, repeats, early: Timing(
        low_us=times[0], median_us=times[1], high_us=times[2], repeats=repeats, stopped_early=early
    ),
    st.lists(st.floats(1e-3, 1e9), min_size=3, max_size=3).map(sorted),
    st.integers(1, 99),
    st.booleans(),
)
measurements = st.builds(
    Measurements,
    of=st.dictionaries(
        st.sampled_from([H200, CPU]), st.dictionaries(products, timings, min_size=1), max_size=2
    ),
)


def only(timing: Timing, kind: HardwareKind = H200) -> Measurements:
    return Measurements(of={kind: {PRODUCT: timing}})


@settings(max_examples=50, deadline=None)
@given(known=measurements)
def test_measurements_are_read_as_they_were_written(known: Measurements) -> None:
    text = written(known)
    assert parse(text) == known
    assert written(parse(text)) == text


def test_a_document_has_a_line_for_each_measurement_in_one_order() -> None:
    later = replace(PRODUCT, tokens=2048)
    wider = replace(PRODUCT, rows=14336)
    one = Measurements(of={H200: {wider: TIMING, later: TIMING, PRODUCT: TIMING}, CPU: {}})
    other = Measurements(of={CPU: {}, H200: {PRODUCT: TIMING, wider: TIMING, later: TIMING}})
    assert written(one) == written(other)
    lines = written(one).splitlines()
    assert next(line for line in lines if '"median_us"' in line) == (
        '{"candidate": "int4 sym g128 triton_tiled", "dtype": "bfloat16", "rows": 4096, "columns": '
        '4096, "tokens": 1, "median_us": 10.0, "low_us": 9.5, "high_us": 10.5, "repeats": 30, '
        '"stopped_early": false},'
    )
    more = written(merged([one, only(replace(TIMING, low_us=10.0))])).splitlines()
    assert len(set(more) - set(lines)) == 1, "a diff shows what changed alone"


@settings(max_examples=50, deadline=None)
@given(many=st.lists(measurements, max_size=3))
def test_merging_keeps_all_and_does_not_depend_on_the_order(many: list[Measurements]) -> None:
    together = merged(many)
    for order in permutations(many):
        assert merged(order) == together
    assert merged([together, *many]) == together
    for one in many:
        for kind, known in one.of.items():
            for product, timing in known.items():
                assert together.of[kind][product].knowledge() >= timing.knowledge()


def test_the_better_known_of_two_is_kept() -> None:
    stopped = replace(TIMING, low_us=10.0, high_us=10.0, stopped_early=True)
    narrow = replace(TIMING, low_us=9.9, high_us=10.1, repeats=5)
    more = replace(TIMING, repeats=31)
    for better, worse in ((TIMING, stopped), (narrow, TIMING), (more, TIMING)):
        assert merged([only(worse), only(better)]) == only(better)
        assert merged([only(better), only(worse)]) == only(better)


def test_times_of_another_kind_are_kept_but_not_used_and_named() -> None:
    stale = replace(H200, torch="2.10.0", kernels="a:2")
    known = merged([only(TIMING), only(TIMING, stale), only(TIMING, CPU)])
    usable, ignored = known.of_kind(H200)
    assert usable == {PRODUCT: TIMING}
    assert ignored == [
        "times of another kind are ignored (1): device cpu and not cuda, name Some CPU and not "
        "NVIDIA H200, driver none and not 570.1, torch 2.13.0 and not 2.11.0, triton none and "
        "not 3.6.0, threads 2 and not none",
        "times of another kind are ignored (1): torch 2.10.0 and not 2.11.0, kernels a:2 and not "
        "a:1",
    ]
    assert known.of_kind(replace(H200, driver="1"))[0] == {}
    assert parse(written(known)) == known


def test_a_candidate_of_another_version_is_left_out_and_named() -> None:
    text = written(only(TIMING)).replace("int4 sym g128", "int3 sym g128")
    read = parse(text)
    assert read.of == {H200: {}}
    _, ignored = read.of_kind(H200)
    assert ignored == [
        "a measurement is ignored: no candidate is called 'int3 sym g128 triton_tiled'"
    ]
    assert merged([read, only(TIMING)]).of_kind(H200) == ({PRODUCT: TIMING}, ignored)


def test_a_kind_is_read_from_what_a_worker_says_of_itself() -> None:
    told = {
        "device": "cpu",
        "torch": "2.13.0",
        "triton": "",
        "name": "Some CPU",
        "bfloat16": "none",
    }
    assert HardwareKind.of(told, kernels="a:1", threads=2) == CPU
    assert CPU.label() == "Some CPU, torch 2.13.0, kernels a:1, 2 threads"
    versions = {f"{kernel}:{version}" for kernel, version in VERSIONS.items()}
    assert set(HardwareKind.of(told).kernels.split()) > versions


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("{", "["), "damaged"),
        (('"version": 1', '"version": 2'), "version 2 where this reads 1"),
        (('"version"', '"versions"'), "no 'version'"),
        (("10.0", "NaN"), "not all finite"),
        (("10.0", "1" + "0" * 400), "damaged"),
        (("10.0", '"10"'), "not all finite"),
        (("9.5", "10.4"), "do not rise"),
        (("9.5", "-1"), "do not rise"),
        (('"repeats": 30', '"repeats": 0'), "repeats: 0"),
        (('"repeats": 30', '"repeats": true'), "repeats: True"),
        (('"tokens": 1', '"tokens": 1.5'), "rows, columns, tokens"),
        (('"tokens": 1', '"token": 1'), "no 'tokens'"),
        (('"repeats"', '"times"'), "times"),
        (("false", "null"), "stopped_early"),
        (('"int4 sym g128 triton_tiled"', "7"), "candidate: 7"),
        (('"bfloat16"', "16"), "dtype: 16"),
        (('"kernels": "a:1"', '"kernels": 1'), "kernels: 1 is not text"),
        (('"name": "NVIDIA H200"', '"name": ""'), "device, name"),
    ],
)
def test_damage_is_one_clear_error(change: tuple[str, str], message: str) -> None:
    text = written(only(TIMING))
    damaged = text.replace(*change, 1)
    assert damaged != text
    with pytest.raises(StoreError, match=message) as told:
        parse(damaged)
    assert str(told.value).startswith("measurements: ")


def test_text_that_ends_early_or_says_a_thing_twice_is_damage() -> None:
    text = written(only(TIMING))
    for end in range(0, len(text) - 2, 7):
        with pytest.raises(StoreError, match="damaged"):
            parse(text[:end])
    document = json.loads(text)
    document["hardware"] *= 2
    with pytest.raises(StoreError, match="stands twice"):
        parse(json.dumps(document))


def test_a_profile_adds_up_calls_and_wants_every_number_of_tokens_timed_to_its_end() -> None:
    known = {
        replace(PRODUCT, tokens=tokens): Timing(
            median_us=10.0 * tokens, low_us=9.0 * tokens, high_us=12.0 * tokens, repeats=3
        )
        for tokens in (1, 16, 2048)
    }
    calls = PROFILES["mix"].calls
    tokens = sum(of * times for of, times in calls.items())
    assert profiled(known, PRODUCT, PROFILES["mix"]) == Time(
        time_us=10.0 * tokens, low_us=9.0 * tokens, high_us=12.0 * tokens
    )
    prefill = replace(PRODUCT, tokens=2048)
    stopped = {**known, prefill: replace(known[prefill], stopped_early=True)}
    assert profiled(stopped, PRODUCT, PROFILES["mix"]) is None
    assert profiled(stopped, PRODUCT, PROFILES["decode_16"]) is not None
    assert profiled({}, PRODUCT, PROFILES["decode_1"]) is None
    for calls in ({}, {0: 1.0}, {1: 0.0}, {1: float("inf")}):
        with pytest.raises(SpecError, match="profile:"):
            Profile(name="odd", calls=calls)
