"""Calibration windows from a text whose every token is unlike all others: its own position."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.spec import CalibrationSpec
from quantcore.errors import SourceError, SpecError
from workers.calibration import digest, token_windows

WORDS = 1000


class NumberTokenizer:
    """A token per word, and the word's own number as its id."""

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        assert options["add_special_tokens"] is False
        return {"input_ids": [int(word) for word in text.split()]}

    def __len__(self) -> int:
        return WORDS


TOKENIZER = NumberTokenizer()


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "numbers.txt"
    path.write_text(" ".join(str(number) for number in range(WORDS)))
    return path


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    return tmp_path / "rows.jsonl"


def write_rows(path: Path, rows: list[Any]) -> None:
    path.write_text("\n".join(json.dumps(row) for row in rows))


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(2, 40), st.integers(0, 2**32))
def test_windows_are_runs_of_the_text_that_do_not_overlap(
    text: Path, sequences: int, length: int, seed: int
) -> None:
    if sequences * length > WORDS:
        sequences = WORDS // length
    spec = CalibrationSpec(text=text, sequences=sequences, length=length, seed=seed)
    windows = token_windows(spec, TOKENIZER)
    assert (windows.shape, windows.dtype) == ((sequences, length), torch.int64)
    assert (windows.diff(dim=1) == 1).all()
    starts = windows[:, 0]
    assert (starts.diff() >= length).all()
    assert (starts.diff() == WORDS // sequences).all()  # over the whole text
    assert torch.equal(windows, token_windows(spec, TOKENIZER))


def test_the_seed_shifts_windows_within_the_stride(text: Path) -> None:
    found = {
        int(
            token_windows(CalibrationSpec(text=text, sequences=5, length=50, seed=s), TOKENIZER)[
                0, 0
            ]
        )
        for s in range(40)
    }
    assert len(found) > 10
    assert found <= set(range(1000 // 5 - 50 + 1))


def test_a_text_that_just_suffices_is_used_whole(text: Path) -> None:
    spec = CalibrationSpec(text=text, sequences=20, length=50, seed=9)
    assert token_windows(spec, TOKENIZER).flatten().tolist() == list(range(WORDS))


def test_the_digest_tells_windows_apart(text: Path) -> None:
    def of(seed: int) -> str:
        spec = CalibrationSpec(text=text, sequences=4, length=20, seed=seed)
        return digest(token_windows(spec, TOKENIZER))

    assert of(1) == of(1)
    assert of(1) != of(2)


@pytest.mark.parametrize(
    ("sequences", "length", "instead"),
    [
        (21, 50, "write sequences: 20, or a shorter length"),
        (4, 300, "write sequences: 3, or a shorter length"),
        (1, 1001, "give a longer text"),
    ],
)
def test_too_short_a_text_says_how_many_sequences_fit(
    text: Path, sequences: int, length: int, instead: str
) -> None:
    spec = CalibrationSpec(text=text, sequences=sequences, length=length)
    with pytest.raises(SpecError, match=rf"^calibration\.text: {sequences} .* has 1000: {instead}"):
        token_windows(spec, TOKENIZER)


@pytest.mark.parametrize(("sequences", "length"), [(21, 50), (4, 300), (17, 60)])
def test_what_is_said_to_fit_does(text: Path, sequences: int, length: int) -> None:
    with pytest.raises(SpecError) as error:
        token_windows(CalibrationSpec(text=text, sequences=sequences, length=length), TOKENIZER)
    fits = int(str(error.value).partition("write sequences: ")[2].partition(",")[0])
    spec = CalibrationSpec(text=text, sequences=fits, length=length)
    assert token_windows(spec, TOKENIZER).shape == (fits, length)


def test_only_the_first_characters_are_read(text: Path) -> None:
    characters = len(" ".join(str(number) for number in range(100)))
    spec = CalibrationSpec(text=text, sequences=2, length=50, max_characters=characters)
    assert token_windows(spec, TOKENIZER).flatten().tolist() == list(range(100))


def test_rows_of_ids_are_taken_as_they_are_in_order(jsonl: Path) -> None:
    write_rows(jsonl, [{"ids": [9, 8, 7, 6]}, {"ids": [1, 2, 3]}, {"ids": [5, 5, 5, 5, 5]}])
    spec = CalibrationSpec(jsonl=jsonl, field="ids", sequences=3, length=3, seed=4)
    assert token_windows(spec, TOKENIZER).tolist() == [[9, 8, 7], [1, 2, 3], [5, 5, 5]]
    fewer = CalibrationSpec(jsonl=jsonl, field="ids", sequences=1, length=4)
    assert token_windows(fewer, TOKENIZER).tolist() == [[9, 8, 7, 6]]


@pytest.mark.parametrize(
    ("short", "expected"),
    [
        ("pad", [[9, 8, 7], [1, -1, -1], [5, 5, 5]]),
        ("drop", [[9, 8, 7], [5, 5, 5], [2, 3, 4]]),
        ("join", [[9, 8, 7], [6, 1, 5], [5, 5, 5]]),
    ],
)
def test_short_rows_of_ids_are_padded_dropped_or_joined(
    jsonl: Path, short: str, expected: list[list[int]]
) -> None:
    rows = [[9, 8, 7, 6], [1], [], [5, 5, 5, 5], [2, 3, 4]]
    write_rows(jsonl, [{"ids": row} for row in rows])
    spec = CalibrationSpec(jsonl=jsonl, field="ids", sequences=3, length=3, short=short)
    assert token_windows(spec, TOKENIZER).tolist() == expected
    too_many = spec.model_copy(update={"sequences": 7})
    fits = {"pad": 4, "drop": 3, "join": 4}[short]
    with pytest.raises(SpecError, match=rf"^calibration.sequences: 7 .*: write sequences: {fits}$"):
        token_windows(too_many, TOKENIZER)


def test_rows_of_text_may_be_documents_in_an_order_by_the_seed(jsonl: Path) -> None:
    write_rows(jsonl, [{"text": text} for text in ("1 2 3 4", "5", "", "6 7 8")])
    spec = CalibrationSpec(jsonl=jsonl, sequences=3, length=3, short="pad")
    orders = [token_windows(spec.model_copy(update={"seed": s}), TOKENIZER) for s in range(9)]
    for windows in orders:
        assert sorted(windows.tolist()) == [[1, 2, 3], [5, -1, -1], [6, 7, 8]]
    assert len({str(windows) for windows in orders}) > 1
    dropped = spec.model_copy(update={"short": "drop", "sequences": 2})
    assert sorted(token_windows(dropped, TOKENIZER).tolist()) == [[1, 2, 3], [6, 7, 8]]
    joined = spec.model_copy(update={"short": "join", "sequences": 2})
    plain = spec.model_copy(update={"short": None, "sequences": 2})
    assert torch.equal(token_windows(joined, TOKENIZER), token_windows(plain, TOKENIZER))


def test_rows_of_text_are_one_text(jsonl: Path) -> None:
    write_rows(jsonl, [{"text": "1 2 3"}, {"text": "4 5"}])
    jsonl.write_text(jsonl.read_text() + "\n\n" + json.dumps({"text": "6"}) + "\n")
    spec = CalibrationSpec(jsonl=jsonl, sequences=2, length=3)
    assert token_windows(spec, TOKENIZER).tolist() == [[1, 2, 3], [4, 5, 6]]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"ids": [1, 2, 3]}], r"sequences: .* has 1 rows: write 1 or fewer"),
        ([{"ids": [1, 2, 3]}, {"ids": [1, 2]}], r"length: row 2 of .* fewer than 3 token ids"),
        ([{"ids": [1, 2, 3]}, {"ids": "1 2 3"}], r"length: row 2 of .* fewer than 3 token ids"),
        ([{"ids": [1, 2, WORDS]}, {"ids": [1, 2, 3]}], "jsonl: row 1 has ids outside"),
        ([{"ids": [1, 2, 3]}, {"ids": [1, 2, -1]}], "jsonl: row 2 has ids outside"),
        ([{"ids": [1, 2, 3]}, {"ids": [1, 2.0, 3]}], "jsonl: row 2 has ids outside"),
        ([{"ids": [1, 2, 3]}, {"ids": [1, "2", 3]}], "jsonl: row 2 has ids outside"),
        ([{"ids": [1, 2, 3]}, {"id": [1, 2, 3]}], "field: line 2 of .* has no 'ids'"),
        ([{"ids": [1, 2, 3]}, [1, 2, 3]], "field: line 2 of .* has no 'ids'"),
        ([{"ids": [1, 2, 3]}, "ids"], "field: line 2 of .* has no 'ids'"),
        ([{"ids": [1, 2, 3]}, None], "field: line 2 of .* has no 'ids'"),
        ([], "jsonl: 2 sequences of 3 tokens .* has 0: give a longer text"),
    ],
)
def test_bad_rows_are_refused(jsonl: Path, rows: list[Any], message: str) -> None:
    write_rows(jsonl, rows)
    spec = CalibrationSpec(jsonl=jsonl, field="ids", sequences=2, length=3)
    with pytest.raises(SpecError, match=rf"^calibration\.{message}"):
        token_windows(spec, TOKENIZER)


def test_a_line_that_is_not_json_is_named(jsonl: Path) -> None:
    jsonl.write_text('{"text": "1"}\n\n{"text": \n')
    with pytest.raises(SourceError, match=r"^line 3 of .*rows\.jsonl is not JSON$"):
        token_windows(CalibrationSpec(jsonl=jsonl), TOKENIZER)


def test_files_that_do_not_read_are_refused(jsonl: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"cannot read .*rows\.jsonl: No such file"):
        token_windows(CalibrationSpec(jsonl=jsonl), TOKENIZER)
    latin = tmp_path / "latin.txt"
    latin.write_bytes(b"caf\xe9")
    with pytest.raises(SourceError, match=r"cannot read .*latin\.txt: .*utf-8"):
        token_windows(CalibrationSpec(text=latin), TOKENIZER)


@pytest.mark.parametrize("row", [None, 3, {"role": "user"}])
def test_a_row_that_is_no_text_is_refused_by_its_number(tmp_path: Path, row: object) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": "a text"}) + "\n" + json.dumps({"text": row}) + "\n")
    spec = CalibrationSpec(jsonl=path, sequences=1, length=2)
    with pytest.raises(SpecError, match="row 2"):
        token_windows(spec, None)
