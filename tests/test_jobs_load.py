"""Job files as text: what is refused, at which line and column, and what remains of the rest."""

from pathlib import Path
from textwrap import dedent

import pytest

from jobs.load import read_document, resolve_paths, validate
from jobs.spec import JobSpec
from quantcore.errors import Fault, JobFaults
from quantcore.schemes import SCHEME_KINDS

GOOD = """\
model:
  path: model
quantization:
  scheme: int4
  method: rtn
output:
  store: out
"""


@pytest.fixture
def job(tmp_path: Path) -> Path:
    return tmp_path / "job.yaml"


def faults_of(job: Path, text: str) -> dict[str, Fault]:
    """Every fault of a job file by its field."""
    job.write_text(dedent(text))
    try:
        _, faults = validate(read_document(job))
    except JobFaults as error:
        faults = list(error.faults)
    by_field = {fault.field: fault for fault in faults}
    assert len(by_field) == len(faults)
    return by_field


def places(faults: dict[str, Fault]) -> dict[str, tuple[int | None, int | None]]:
    return {field: (fault.line, fault.column) for field, fault in faults.items()}


def accepted(job: Path, text: str) -> JobSpec:
    job.write_text(dedent(text))
    spec, faults = validate(read_document(job))
    assert not faults
    assert spec is not None
    return spec


def test_faults_of_all_kinds_are_reported_at_once_with_their_places(job: Path) -> None:
    faults = faults_of(
        job,
        """\
        modle:
          path: m
        model:
          path: model
          dtpye: float32
        quantization:
          scheme: int5
          group_size: "64"
          overrides:
            - match: "re:(q_proj"
              skip: true
            - match: "*.down_proj"
            - {match: "*.up_proj", skip: true, method: rtn}
        compute_dtype: float64
        calibration:
          text: a.txt
          jsonl: b.jsonl
        workers:
          threads: 1.5
          memory: 16GB
        evaluation:
          limit: 3
        """,
    )
    assert places(faults) == {
        "modle": (1, 1),
        "model.dtpye": (5, 3),
        "quantization.scheme": (7, 3),
        "quantization.group_size": (8, 3),
        "quantization.overrides.0.match": (10, 7),
        "quantization.overrides.1": (12, 7),
        "quantization.overrides.2": (13, 7),
        "compute_dtype": (14, 1),
        "calibration": (15, 1),
        "workers.threads": (19, 3),
        "workers.memory": (20, 3),
        "evaluation": (21, 1),
        "output": (None, None),
    }
    messages = {field: fault.message for field, fault in faults.items()}
    assert messages["modle"].startswith("unknown key: write one of name, model, quantization,")
    assert messages["model.dtpye"] == "unknown key: write one of path, dtype"
    assert messages["quantization.scheme"] == (
        f"unknown scheme 'int5': write one of {', '.join(SCHEME_KINDS)}"
    )
    assert "got '64'" in messages["quantization.group_size"]
    assert "'channel'" in messages["quantization.group_size"]
    assert messages["quantization.overrides.0.match"].startswith("not a regular expression: ")
    assert messages["quantization.overrides.1"].startswith("changes nothing: write skip: true")
    assert "drop skip or the other keys" in messages["quantization.overrides.2"]
    assert "'float32', 'bfloat16' or 'float16'" in messages["compute_dtype"]
    assert "either text or jsonl" in messages["calibration"]
    assert "got 1.5" in messages["workers.threads"]
    assert "name a text, or lm-eval tasks" in messages["evaluation"]
    assert messages["output"] == "missing: this key is required"


def test_the_error_prints_file_line_column_and_field(job: Path) -> None:
    job.write_text(GOOD.replace("  store: out", "  store: ''") + "speed: 9\n")
    _, faults = validate(read_document(job))
    lines = JobFaults("job.yaml", faults).lines()
    assert lines[0].startswith("job.yaml:7:3: output.store: ")
    assert lines[1].startswith("job.yaml:8:1: speed: unknown key: ")


@pytest.mark.parametrize(
    ("old", "new", "field", "place"),
    [
        ("model:\n  path: model\n", "model: {}\n", "model.path", (1, 1)),
        ("  scheme: int4\n", "", "quantization.scheme", (3, 1)),
        (
            "  method: rtn\n",
            "  overrides: [{skip: true}]\n",
            "quantization.overrides.0.match",
            (5, 15),
        ),
    ],
)
def test_a_missing_key_is_placed_at_its_section(
    job: Path, old: str, new: str, field: str, place: tuple[int, int]
) -> None:
    faults = faults_of(job, GOOD.replace(old, new))
    assert places(faults) == {field: place}
    assert faults[field].message == "missing: this key is required"


@pytest.mark.parametrize(
    ("line", "field"),
    [
        ('calibration: {text: t, sequences: "64"}', "calibration.sequences"),
        ("calibration: {text: t, sequences: 64.0}", "calibration.sequences"),
        ("calibration: {text: t, sequences: yes}", "calibration.sequences"),
        ("calibration: {text: t, sequences: 0}", "calibration.sequences"),
        ("calibration: {text: t, length: 1}", "calibration.length"),
        ("calibration: {text: t, seed: -1}", "calibration.seed"),
        ("calibration: {text: 7}", "calibration.text"),
        ("workers: {count: many}", "workers.count"),
        ("workers: {cpus: .inf}", "workers.cpus"),
        ("workers: {cpus: .nan}", "workers.cpus"),
        ("workers: {cpus: '2'}", "workers.cpus"),
        ("workers: {kind: gpu}", "workers.kind"),
        ("workers:", "workers"),
        ("workers: 4", "workers"),
        ("compute_dtype: 32", "compute_dtype"),
        ("name: 12", "name"),
        ("name: two words", "name"),
        ("name: .hidden", "name"),
        ("evaluation: {tasks: wikitext}", "evaluation.tasks"),
        ("evaluation: {text: t, baselines: [gptq]}", "evaluation.baselines.0"),
    ],
)
def test_values_are_not_converted(job: Path, line: str, field: str) -> None:
    faults = faults_of(job, GOOD + line + "\n")
    assert list(faults) == [field]
    assert faults[field].line == 8


@pytest.mark.parametrize("key", ["damping: 0", "damping: 1.0", "damping: .nan", "act_order: 1"])
def test_solver_settings_are_held_to_their_range(job: Path, key: str) -> None:
    text = GOOD.replace("  method: rtn\n", f"  method: rtn\n  gptq:\n    {key}\n")
    field = f"quantization.gptq.{key.partition(':')[0]}"
    assert places(faults_of(job, text)) == {field: (7, 5)}


@pytest.mark.parametrize(
    ("text", "line", "column"),
    [
        (GOOD + "model:\n  path: other\n", 8, 1),
        (GOOD.replace("  method: rtn\n", "  method: rtn\n  scheme: int8\n"), 6, 3),
        (GOOD + "evaluation: {tasks: [a], tasks: [b]}\n", 8, 26),
    ],
)
def test_a_key_written_twice_is_refused_where_it_comes_again(
    job: Path, text: str, line: int, column: int
) -> None:
    (fault,) = faults_of(job, text).values()
    assert (fault.line, fault.column, fault.message) == (line, column, "written twice: keep one")


def test_equal_keys_of_neighbours_are_not_doubles(job: Path) -> None:
    overrides = "  overrides: [{match: a, skip: true}, {match: b, skip: true}]\n"
    spec = accepted(job, GOOD.replace("  method: rtn\n", "  method: rtn\n" + overrides))
    assert [o.match for o in spec.quantization.overrides] == ["a", "b"]


@pytest.mark.parametrize(
    ("text", "line", "column", "words"),
    [
        ("model: [m\n", 2, 1, "not YAML"),
        ("model:\n\tpath: m\n", 2, 1, "not YAML"),
        (GOOD + "---\n" + GOOD, 8, 1, "another document"),
        (GOOD + "name: !!python/object:os.x {}\n", 8, 7, "not YAML"),
        (GOOD + "name: 2024-13-45\n", None, None, "month must be in 1..12"),
        (GOOD + "2024-01-01: x\n", 8, 1, "keys are words"),
        (GOOD + "on: x\n", 8, 1, "keys are words"),
        (GOOD + "workers: &w {count: *w}\n", None, None, "an anchor"),
        ("", None, None, "write a mapping"),
        ("- model\n", None, None, "write a mapping"),
        ("just words\n", None, None, "write a mapping"),
    ],
)
def test_what_is_no_mapping_of_keys_is_refused(
    job: Path, text: str, line: int | None, column: int | None, words: str
) -> None:
    (fault,) = faults_of(job, text).values()
    assert words in fault.message
    assert (fault.line, fault.column) == (line, column)


def test_files_that_do_not_read_are_refused(job: Path) -> None:
    with pytest.raises(JobFaults, match="cannot read: No such file"):
        read_document(job)
    job.write_bytes(b"name: \xff\xfe")
    with pytest.raises(JobFaults, match=r"cannot read: .*utf-8"):
        read_document(job)
    with pytest.raises(JobFaults, match="cannot read: Is a directory"):
        read_document(job.parent)


def test_the_name_is_that_of_the_file_unless_written(tmp_path: Path) -> None:
    assert accepted(tmp_path / "smollm2-int4.yaml", GOOD).name == "smollm2-int4"
    assert accepted(tmp_path / "a.yaml", GOOD + "name: b\n").name == "b"
    assert list(faults_of(tmp_path / "my job.yaml", GOOD)) == ["name"]


def test_what_is_sound_remains_for_further_checks(job: Path) -> None:
    """The model and the texts are looked at even when a key beside them is wrong."""
    job.write_text(
        GOOD.replace("  path: model\n", "  path: model\n  model: x\n")
        + "workers: {threads: 0, count: 3}\nbogus: 1\n"
    )
    spec, faults = validate(read_document(job))
    assert {fault.field for fault in faults} == {"model.model", "workers.threads", "bogus"}
    assert spec is not None
    assert (spec.model.path, spec.workers.count, spec.workers.threads) == ("model", 3, 1)


def test_without_a_required_value_nothing_remains(job: Path) -> None:
    job.write_text(GOOD.replace("scheme: int4", "scheme: int5"))
    spec, faults = validate(read_document(job))
    assert spec is None
    assert [fault.field for fault in faults] == ["quantization.scheme"]


@pytest.mark.parametrize(
    "url", ["s3://key:verysecret@bucket/path", "s3://verysecret@bucket", "https://u:verysecret@h/p"]
)
def test_credentials_in_a_store_are_refused_and_not_shown_again(job: Path, url: str) -> None:
    faults = faults_of(job, GOOD.replace("store: out", f"store: {url}"))
    assert places(faults) == {"output.store": (7, 3)}
    assert "verysecret" not in str(JobFaults(str(job), list(faults.values())))


@pytest.mark.parametrize("url", ["gs://bucket/a", "S3://bucket/a", "s3:///a", "http://host/a"])
def test_stores_that_are_none_are_refused(job: Path, url: str) -> None:
    faults = faults_of(job, GOOD.replace("store: out", f"store: {url}"))
    assert "s3://bucket/path" in faults["output.store"].message


def test_paths_start_at_the_job_file(job: Path, tmp_path: Path) -> None:
    text = GOOD + "calibration: {text: ../c.txt}\nevaluation: {text: e.txt, task_folder: t}\n"
    spec = resolve_paths(accepted(job, text), tmp_path / "jobs")
    assert spec.calibration is not None
    assert spec.evaluation is not None
    assert spec.model.path == str(tmp_path / "jobs" / "model")
    assert spec.calibration.text == tmp_path / "c.txt"
    assert spec.calibration.jsonl is None
    assert spec.evaluation.text == tmp_path / "jobs" / "e.txt"
    assert spec.evaluation.task_folder == tmp_path / "jobs" / "t"
    assert spec.output.store == str(tmp_path / "jobs" / "out")


@pytest.mark.parametrize(
    ("store", "resolved"),
    [
        ("/elsewhere/out", "/elsewhere/out"),
        ("file:///elsewhere/out", "/elsewhere/out"),
        ("s3://bucket/jobs", "s3://bucket/jobs"),
        ("~/out", "{home}/out"),
    ],
)
def test_stores_that_are_absolute_stay(
    job: Path, monkeypatch: pytest.MonkeyPatch, store: str, resolved: str
) -> None:
    monkeypatch.setenv("HOME", "/home/ahab")
    spec = resolve_paths(
        accepted(job, GOOD.replace("store: out", f"store: {store}")), Path("/jobs")
    )
    assert spec.output.store == resolved.format(home="/home/ahab")


def test_the_home_of_nobody_is_a_path_that_is_not_there(job: Path) -> None:
    spec = accepted(job, GOOD.replace("path: model", "path: ~no-such-user/model"))
    assert resolve_paths(spec, Path("/jobs")).model.path == "/jobs/~no-such-user/model"


def test_a_number_that_yaml_reads_as_a_word_says_how_to_write_it(job: Path) -> None:
    faults = faults_of(job, GOOD.replace("method: rtn", "gptq: {damping: 1e-2}\n  method: rtn"))
    assert list(faults) == ["quantization.gptq.damping"]
    assert "as in 1.0e-2" in faults["quantization.gptq.damping"].message


def test_an_override_that_its_own_scheme_forbids_is_named_by_its_number(job: Path) -> None:
    override = "overrides: [{match: '*a', scheme: int8_dynamic, group_size: 32}]"
    faults = faults_of(job, GOOD.replace("method: rtn", f"{override}\n  method: rtn"))
    assert list(faults) == ["quantization.overrides.0"]
