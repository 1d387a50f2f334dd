"""Calibration from lm-eval tasks over local rows of numbers: a token is a word, its id the number.

Every document begins with a number of its own, so that a sequence tells where it came from.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from jobs.spec import CalibrationSpec, EvaluationSpec
from quantcore.errors import SourceError, SpecError
from tests.task_files import CHOICE, GENERATE, ROLLING, Row, texts, write_task
from tests.test_workers_calibration import TOKENIZER
from workers.documents import Windows, measured_tasks, task_windows
from workers.plan import PADDING

pytestmark = pytest.mark.filterwarnings("ignore")


def numbered(first: int, lengths: list[int]) -> list[Row]:
    """Documents of so many words: the first is a number of the document's own, the rest ones."""
    return texts(*(" ".join([str(first + n)] + ["1"] * (k - 1)) for n, k in enumerate(lengths)))


def taken(folder: Path, *tasks: str, **options: Any) -> Windows:
    chosen = {"sequences": 3, "length": 4, **options}
    spec = CalibrationSpec(tasks=tasks, task_folder=folder, **chosen)
    return task_windows(spec, TOKENIZER)


def test_long_documents_are_cut_off_and_short_ones_padded(tmp_path: Path) -> None:
    write_task(tmp_path, "a", {"training": numbered(100, [4, 2, 7]), "test": numbered(9, [5])})
    windows = taken(tmp_path, "a")
    rows = sorted(windows.ids_SL.tolist())
    assert rows == [[100, 1, 1, 1], [101, 1, PADDING, PADDING], [102, 1, 1, 1]]
    assert windows.ids_SL.dtype == torch.int64
    assert windows.sources == {"a (training)": 3}


def test_short_documents_are_dropped_where_the_job_says_so(tmp_path: Path) -> None:
    write_task(tmp_path, "a", {"training": numbered(100, [3, 4, 1, 9, 5]), "test": texts("9")})
    rows = sorted(taken(tmp_path, "a", short="drop").ids_SL[:, 0].tolist())
    assert rows == [101, 103, 104]


def test_short_documents_are_joined_where_the_job_says_so(tmp_path: Path) -> None:
    write_task(tmp_path, "a", {"training": numbered(100, [3, 3, 3, 3])})
    write_task(tmp_path, "b", {"training": numbered(200, [3] * 9), "test": numbered(9, [5])})
    windows = taken(tmp_path, "b", short="join", sequences=6)
    assert (windows.ids_SL != PADDING).all()
    ids = windows.ids_SL.flatten().tolist()
    assert ids[1::3] == ids[2::3] == [1] * 8
    assert len(set(ids[::3])) == 8
    assert windows.sources == {"b (training)": 6}


def test_the_seed_decides_which_documents_are_taken_and_in_what_order(tmp_path: Path) -> None:
    write_task(tmp_path, "a", {"training": numbered(100, [4] * 40), "test": numbered(9, [5])})
    first = [taken(tmp_path, "a", seed=seed).ids_SL[:, 0].tolist() for seed in (1, 1, 2)]
    assert first[0] == first[1] != first[2]
    all_of_them = taken(tmp_path, "a", seed=5, sequences=40).ids_SL[:, 0].tolist()
    assert sorted(all_of_them) == list(range(100, 140)) != all_of_them


def test_the_limit_is_on_the_documents_of_each_task(tmp_path: Path) -> None:
    write_task(tmp_path, "a", {"training": numbered(100, [4] * 9), "test": numbered(9, [5])})
    write_task(tmp_path, "b", {"training": numbered(200, [4] * 9), "test": numbered(9, [5])})
    rows = taken(tmp_path, "a", "b", limit=2, sequences=4, seed=3).ids_SL[:, 0].tolist()
    assert sorted(rows) == [100, 101, 200, 201]


def test_tasks_take_turns_until_one_has_no_more(tmp_path: Path) -> None:
    write_task(tmp_path, "a", {"training": numbered(100, [4] * 2), "test": numbered(9, [5])})
    write_task(tmp_path, "b", {"training": numbered(200, [4] * 9), "test": numbered(9, [5])})
    windows = taken(tmp_path, "a", "b", sequences=6)
    assert [row // 100 for row in windows.ids_SL[:, 0].tolist()] == [1, 2, 1, 2, 2, 2]
    assert windows.sources == {"a (training)": 2, "b (training)": 4}


def test_documents_without_a_token_count_as_not_there(tmp_path: Path) -> None:
    write_task(tmp_path, "a", {"training": texts("", "5", "", "6 1"), "test": texts("9")})
    assert sorted(taken(tmp_path, "a", sequences=2).ids_SL[:, 0].tolist()) == [5, 6]
    with pytest.raises(SpecError, match=r"^calibration\.sequences: .* there are 2 documents of a:"):
        taken(tmp_path, "a")


@pytest.mark.parametrize(
    ("has", "split", "taken_from"),
    [
        (("training", "validation", "test"), None, "training"),
        (("validation", "test"), None, "validation"),
        (("training", "validation"), None, "training"),
        (("validation",), None, "validation"),
        (("test",), None, "test"),
        (("training", "validation", "test"), "test", "test"),
        (("training", "validation", "test"), "validation", "validation"),
    ],
)
def test_documents_come_from_a_split_that_is_not_measured(
    tmp_path: Path, has: tuple[str, ...], split: str | None, taken_from: str
) -> None:
    first = {"training": 100, "validation": 200, "test": 300}
    write_task(tmp_path, "a", {name: numbered(first[name], [4] * 3) for name in has})
    windows = taken(tmp_path, "a", split=split)
    assert sorted(windows.ids_SL[:, 0].tolist()) == [first[taken_from] + n for n in range(3)]
    assert windows.sources == {f"a ({taken_from})": 3}


@pytest.mark.parametrize(("answer", "expected"), [(0, 5), (1, 6), ("1", 6), (9, 5)])
def test_of_a_multiple_choice_the_right_answer_is_read(
    tmp_path: Path, answer: int | str, expected: int
) -> None:
    row = {"question": "100 1", "choices": ["5", "6"], "answer": answer}
    rows = {"validation": [row], "test": [{**row, "answer": type(answer)(0)}]}
    write_task(tmp_path, "a", rows, **CHOICE)
    assert taken(tmp_path, "a", sequences=1).ids_SL.tolist() == [[100, 1, expected, PADDING]]


def test_of_a_choice_between_contexts_the_right_one_is_read(tmp_path: Path) -> None:
    settings = {**CHOICE, "doc_to_text": "{{answer}}", "doc_to_target": "{{end}}"}
    row = {"answer": 1, "choices": ["5 50", "6 60"], "end": "7 8"}
    write_task(tmp_path, "a", {"training": [row], "test": [row]}, **settings)
    assert taken(tmp_path, "a", sequences=1).ids_SL.tolist() == [[6, 60, 7, 8]]


def test_of_what_a_model_completes_the_context_is_read(tmp_path: Path) -> None:
    row = {"question": "100 1", "answer": "7"}
    write_task(tmp_path, "a", {"training": [row], "test": [row]}, **GENERATE)
    assert taken(tmp_path, "a", sequences=1).ids_SL.tolist() == [[100, 1, PADDING, PADDING]]


def test_examples_stand_in_the_context_and_hang_on_the_seed_alone(tmp_path: Path) -> None:
    rows = [{"question": f"{n} 1", "choices": ["5", "6"], "answer": 0} for n in range(100, 130)]
    settings = {**CHOICE, "num_fewshot": 2, "fewshot_split": "training"}
    write_task(tmp_path, "a", {"training": rows, "test": rows}, **settings)
    ids = taken(tmp_path, "a", length=12).ids_SL
    assert ids.shape == (3, 12)
    assert (ids[:, [1, 4, 7]] == 1).all()
    assert (ids[:, [2, 5, 8]] == 5).all()
    assert (ids[:, 9:] == PADDING).all()
    assert torch.equal(ids, taken(tmp_path, "a", length=12).ids_SL)


def test_groups_and_tags_are_followed(tmp_path: Path) -> None:
    for name, first in {"a": 100, "b": 200}.items():
        rows = {"training": numbered(first, [4] * 3), "test": numbered(9, [5])}
        write_task(tmp_path, name, rows, **ROLLING, tag="both")
    (tmp_path / "g.yaml").write_text(yaml.safe_dump({"group": "g", "task": ["b"]}))
    expected = {"a (training)": 2, "b (training)": 2}
    assert taken(tmp_path, "both", sequences=4).sources == expected
    assert taken(tmp_path, "g").sources == {"b (training)": 3}


class TestRefusals:
    @pytest.fixture
    def few(self, tmp_path: Path) -> Path:
        write_task(tmp_path, "a", {"training": numbered(100, [4, 2, 7]), "test": numbered(9, [5])})
        return tmp_path

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (
                {"sequences": 9},
                "sequences: 9 sequences of 4 tokens are wanted, and there are 3 documents of a: "
                "write sequences: 3, or more tasks",
            ),
            ({"limit": 2}, r"sequences: .* 2 documents of a \(limit: 2\): write sequences: 2, "),
            (
                {"short": "drop"},
                "sequences: .* of 3 documents of a 2 are that long: write sequences: 2, a shorter "
                "length, or short: pad",
            ),
            (
                {"short": "drop", "length": 8},
                "sequences: .* of 3 documents of a 0 are that long: a shorter length, or short",
            ),
            (
                {"short": "join", "sequences": 4},
                "sequences: .* 3 documents of a make 3 when joined: write sequences: 3, a shorter",
            ),
            ({"split": "validation"}, "split: 'a' has no validation split: write training or test"),
        ],
    )
    def test_too_little(self, few: Path, options: dict[str, Any], message: str) -> None:
        with pytest.raises(SpecError, match=rf"^calibration\.{message}"):
            taken(few, "a", **options)

    def test_an_unknown_task(self) -> None:
        spec = CalibrationSpec(tasks=("nope",))  # without a folder: lm-eval's index is read once
        with pytest.raises(SpecError, match=r"^calibration\.tasks: lm-eval knows no task 'nope'"):
            task_windows(spec, TOKENIZER)

    def test_data_that_is_not_there(self, few: Path) -> None:
        (few / "a-training.jsonl").unlink()
        with pytest.raises(SourceError, match=r"^calibration\.tasks: lm-eval cannot load 'a': "):
            taken(few, "a")

    def test_a_split_without_documents(self, tmp_path: Path) -> None:
        settings = {**ROLLING, "process_docs": "!none"}
        write_task(tmp_path, "a", {"training": texts("1"), "test": texts("1")}, **settings)
        file = tmp_path / "a.yaml"
        file.write_text(file.read_text().replace("'!none'", "!function none.of_training"))
        (tmp_path / "none.py").write_text(
            "def of_training(rows):\n    return rows.filter(lambda row: rows.split != 'training')\n"
        )
        with pytest.raises(SpecError, match="'a' has no documents in its training split"):
            taken(tmp_path, "a")

    def test_a_template_that_fails(self, tmp_path: Path) -> None:
        """The first row of the test split is tried when the task is loaded; this one is not."""
        settings = {**ROLLING, "doc_to_target": "{{100 // text}}"}
        rows = {"training": [{"text": 0}], "test": [{"text": 1}]}
        write_task(tmp_path, "a", rows, **settings)
        with pytest.raises(SourceError, match=r"cannot ask document 0 of 'a' \(training\)"):
            taken(tmp_path, "a")

    def test_images(self, few: Path) -> None:
        rows = {"training": texts("1"), "test": texts("1")}
        write_task(few, "seen", rows, **GENERATE | {"doc_to_text": "text", "doc_to_target": "text"})
        file = few / "seen.yaml"
        file.write_text(file.read_text() + "doc_to_image: [text]\n")
        with pytest.raises(SpecError, match="'seen' asks about images or sound"):
            taken(few, "seen")


class TestMeasured:
    """What calibrates and what is measured by, told apart from the task files alone."""

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        all_splits = {s: texts("1") for s in ("training", "validation", "test")}
        write_task(tmp_path, "whole", all_splits)
        write_task(tmp_path, "alone", {"test": texts("1")})
        write_task(tmp_path, "two", {"training": texts("1"), "validation": texts("1")})
        write_task(tmp_path, "one", {"validation": texts("1")}, **ROLLING, tag="tagged")
        other = yaml.safe_load((tmp_path / "alone.yaml").read_text()) | {"task": "namesake"}
        (tmp_path / "namesake.yaml").write_text(yaml.safe_dump(other))
        group = {"group": "g", "task": ["whole", {"group": "inner", "task": ["alone"]}]}
        (tmp_path / "g.yaml").write_text(yaml.safe_dump(group))
        return tmp_path

    @pytest.mark.parametrize(
        ("calibrates", "measures", "split", "expected"),
        [
            (["whole"], ["whole"], None, []),
            (["whole"], ["whole"], "validation", []),
            (["whole"], ["whole"], "test", [("whole", "test")]),
            (["two"], ["two"], None, []),
            (["one"], ["one"], None, [("one", "validation")]),
            (["one"], ["tagged"], None, [("one", "validation")]),
            (["whole", "alone"], ["g"], None, [("alone", "test")]),
            (["g"], ["namesake"], None, [("alone", "test")]),
            (["one"], ["g", "two"], None, []),
            (["alone"], [], None, []),
        ],
    )
    def test_what_both_use_is_found(
        self,
        folder: Path,
        calibrates: list[str],
        measures: list[str],
        split: Any,
        expected: list[tuple[str, str]],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr("datasets.load_dataset", None)
        calibration = CalibrationSpec(tasks=tuple(calibrates), task_folder=folder, split=split)
        evaluation = EvaluationSpec(text=folder, tasks=tuple(measures), task_folder=folder)
        assert measured_tasks(calibration, evaluation) == expected
        assert measured_tasks(calibration, None) == []
