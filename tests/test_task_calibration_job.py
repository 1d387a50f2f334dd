"""Jobs that are calibrated from lm-eval tasks, with documents too short to fill their sequences."""

import dataclasses
import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from jobs.load import read_document, resolve_paths, validate
from orchestrator.checks import check
from orchestrator.described import describe
from orchestrator.driver import run_job
from orchestrator.executors import InProcessExecutor
from orchestrator.loop import Observer
from orchestrator.ray_jobs import _packed
from quantcore.errors import JobFaults
from tests.command import quantfleet
from tests.conftest import BLOCKS
from tests.faults import KillingExecutor, schedule
from tests.task_files import texts, write_task
from tests.test_orchestrator_job import model_bytes, run_here
from workers.layout import STATISTICS_INDEX
from workers.plan import PADDING

JobFile = Callable[..., Path]

LENGTH = 40
DOCUMENTS = [
    " ".join(f"Ship {number} sailed on and on, said Ahab." for _ in range(1 + number % 5))
    for number in range(40)
]
SEQUENCES = 36  # two to a micro-batch


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "tasks"
    folder.mkdir()
    write_task(folder, "ships", {"training": texts(*DOCUMENTS), "test": texts("The sea.")})
    write_task(folder, "tested", {"test": texts(*DOCUMENTS)})
    return folder


@pytest.fixture
def from_tasks(job_file: JobFile, folder: Path) -> Callable[..., Path]:
    def write(name: str = "job", calibration: dict[str, Any] | None = None, **more: Any) -> Path:
        texts = {"tasks": ["ships"], "task_folder": str(folder), "length": LENGTH}
        section = {**texts, "sequences": SEQUENCES, "seed": 3, **(calibration or {})}
        return job_file(name, calibration=section, **more)

    return write


def tokens_of(job: Path) -> list[Tensor]:
    """Each sequence without its padding."""
    tokens = check(job).plan.tokens
    assert tokens is not None
    return [torch.tensor(row[row != PADDING], dtype=torch.int64) for row in tokens]


def statistics_of(store: str) -> Iterator[tuple[dict[str, Any], dict[str, Tensor]]]:
    index = json.loads((Path(store) / STATISTICS_INDEX).read_text())
    for record in itertools.chain(*index["blocks"]):
        yield record, load_file(Path(store) / record["file"])


def inputs_of(model: Path, documents: list[Tensor]) -> dict[str, Tensor]:
    """What each linear is handed in float64, document by document: (tokens, in_features)."""
    from transformers import AutoModelForCausalLM

    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64).eval()
    seen: dict[str, list[Tensor]] = {}
    for name, module in whole.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(
                lambda _, args, name=name: seen.setdefault(name, []).append(args[0].flatten(0, -2))
            )
    with torch.no_grad():
        for ids_L in documents:
            whole(ids_L[None])
    return {name: torch.cat(parts) for name, parts in seen.items()}


def test_kept_statistics_are_those_of_the_documents_alone(
    from_tasks: JobFile, model_folder: Callable[..., Path]
) -> None:
    """The last linear alone is quantized, so that all inputs are the source's own."""
    skips = [
        {"match": "*", "skip": True},
        {"match": "*.layers.2.mlp.down_proj", "scheme": "int4", "group_size": 32},
    ]
    quantization = {"scheme": "int4", "group_size": 32, "method": "gptq", "overrides": skips}
    job = from_tasks("job", {"keep_statistics": True}, quantization=quantization)
    documents = tokens_of(job)
    count = sum(map(len, documents))
    assert len({len(ids) for ids in documents}) > 2
    assert count < 0.9 * SEQUENCES * LENGTH
    expected = inputs_of(model_folder("llama"), documents)
    result = run_here(job)
    groups = list(statistics_of(result.store))
    assert len(groups) == 4 * BLOCKS
    for record, tensors in groups:
        x_TI = expected[record["linears"][0]]
        assert (record["tokens"], record["dropped"]) == (count, 0)
        sum_II = x_TI.t() @ x_TI
        lower = sum_II[torch.ones_like(sum_II, dtype=torch.bool).tril()]
        torch.testing.assert_close(
            tensors["sum"].double(), lower, rtol=1e-5, atol=1e-5 * float(sum_II.abs().max())
        )
        bounds = {"low": x_TI.amin(0).clamp(max=0), "high": x_TI.amax(0).clamp(min=0)}
        for name, bound_I in bounds.items():
            torch.testing.assert_close(tensors[name].double(), bound_I, rtol=1e-4, atol=1e-5)
        sample_SI = tensors["sample"].double()
        assert len(sample_SI) > 400
        assert torch.cdist(sample_SI, x_TI).amin(1).max() < 1e-4 * x_TI.norm(dim=1).mean()
    assert [line["tokens"] for line in result.report["layers"]] == [count]


@pytest.mark.parametrize(
    "quantization",
    [
        {"scheme": "int4", "group_size": 32, "method": "gptq"},
        {"scheme": "int8_static", "method": "smoothquant"},
    ],
    ids=str,
)
def test_any_number_of_workers_gives_the_same_bytes(
    from_tasks: JobFile, quantization: dict[str, Any]
) -> None:
    first, *others = [
        model_bytes(run_here(from_tasks(f"w{n}", quantization=quantization), workers=n).store)
        for n in (1, 2, 3)
    ]
    assert all(other == first for other in others)


def test_losses_and_shards_change_nothing(from_tasks: JobFile) -> None:
    whole = run_here(from_tasks("whole", {"shards": 2})).store
    for seed in (1, 2, 3):
        result = run_job(
            check(from_tasks(f"seed-{seed}", {"shards": 2})),
            lambda plan, seed=seed: KillingExecutor(plan, 2, schedule(seed, BLOCKS)),
            Observer(),
        )
        assert model_bytes(result.store) == model_bytes(whole)


def test_a_micro_batch_that_is_all_padding_adds_nothing(from_tasks: JobFile) -> None:
    def sums(name: str, empty: bool) -> list[tuple[int, int, Tensor]]:
        prepared = check(from_tasks(name, {"keep_statistics": True}))
        tokens = prepared.plan.tokens
        assert tokens is not None and prepared.plan.contract.micro_batch == 2
        tokens = tokens.copy()
        tokens[4:6] = PADDING
        if not empty:
            tokens[4, 0] = 7
        plan = dataclasses.replace(prepared.plan, tokens=tokens)
        result = run_job(
            dataclasses.replace(prepared, plan=plan),
            lambda plan: InProcessExecutor(plan, ["cpu"] * 2),
            Observer(),
        )
        return [(r["tokens"], r["dropped"], t["sum"]) for r, t in statistics_of(result.store)]

    for (most, none, whole), (fewer, still_none, rest) in zip(
        sums("one", False), sums("none", True), strict=True
    ):
        assert (most - fewer, none, still_none) == (1, 0, 0)
        assert rest.isfinite().all()
        assert not torch.equal(whole, rest)


def test_the_report_says_what_it_was_calibrated_with(from_tasks: JobFile) -> None:
    job = from_tasks("job")
    report = run_here(job).report
    count = sum(map(len, tokens_of(job)))
    assert report["calibration"] == {
        "sequences": SEQUENCES,
        "length": LENGTH,
        "tokens": count,
        "tasks": {"ships (training)": SEQUENCES},
    }
    assert {line["tokens"] for line in report["layers"]} == {count}
    assert {line["dropped_tokens"] for line in report["layers"]} == {0}


def test_the_store_alone_is_enough_to_go_on(from_tasks: JobFile, folder: Path) -> None:
    result = run_here(from_tasks("job"))
    store, whole = Path(result.store), model_bytes(result.store)
    calibration = result.report["calibration"]
    shutil.rmtree(folder)
    for record in [store / "manifest.json", store / "ledger" / "block-00001.json"]:
        record.unlink()
    outcome = quantfleet("resume", "--in-process", str(store))
    assert outcome.code == 0, outcome
    assert model_bytes(str(store)) == whole
    report = json.loads((store / "report" / "report.json").read_text())
    assert report["calibration"] == calibration


def test_padding_is_predicted_to_cost_a_copy(from_tasks: JobFile) -> None:
    padded = check(from_tasks("padded", {"sequences": 24})).prediction.host["collect"]["products"]
    whole = check(from_tasks("whole", {"short": "join", "sequences": 24})).prediction
    assert padded > whole.host["collect"]["products"]


class TestRefusals:
    @pytest.mark.parametrize(
        ("calibration", "message"),
        [
            (
                {"tasks": ["nope"], "task_folder": None},
                r"calibration.tasks: lm-eval knows no task 'nope'",
            ),
            ({"task_folder": "/nowhere"}, r"calibration.task_folder: there is no folder /nowhere"),
            ({"text": "x.txt"}, r"calibration: name one source of texts: write either text or"),
            ({"sequences": 41}, r"calibration.sequences: 41 sequences .*: write sequences: 40, or"),
            ({"limit": 5}, r"calibration.sequences: .* 5 documents of ships \(limit: 5\): write "),
            ({"short": "drop"}, r"calibration.sequences: .* are that long: write sequences: \d+, "),
            ({"short": "cut"}, r"calibration.short: Input should be 'pad', 'drop' or 'join'"),
            ({"split": "validation"}, r"calibration.split: 'ships' has no validation split: write"),
            ({"length": 1000}, r"calibration.length: the model takes at most 256 tokens"),
        ],
    )
    def test_bad_calibrations(
        self, from_tasks: JobFile, calibration: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(JobFaults, match=rf":\d+:\d+: {message}") as caught:
            check(from_tasks("job", calibration))
        assert len(caught.value.faults) == 1

    @pytest.mark.parametrize("key", ["task_folder", "limit", "split"])
    def test_keys_of_tasks_without_tasks(
        self, job_file: JobFile, text_file: Path, key: str
    ) -> None:
        value = {"task_folder": "tasks", "limit": 3, "split": "test"}[key]
        job = job_file("job", calibration={"text": str(text_file), key: value})
        with pytest.raises(JobFaults, match=f"calibration: {key} is about lm-eval tasks"):
            check(job)

    def test_short_documents_of_a_text(self, job_file: JobFile, text_file: Path) -> None:
        job = job_file("job", calibration={"text": str(text_file), "short": "pad"})
        with pytest.raises(JobFaults, match="calibration: a text is cut into whole windows: drop"):
            check(job)

    def test_what_the_evaluation_measures_by(self, from_tasks: JobFile, folder: Path) -> None:
        evaluation = {"tasks": ["tested", "ships"], "task_folder": str(folder)}
        message = (
            "calibration.tasks: the test split of 'tested' is what evaluation.tasks measures by: "
            "name another task, or write calibration.split: test to take it all the same"
        )
        with pytest.raises(JobFaults, match=message):
            check(from_tasks("job", {"tasks": ["tested"]}, evaluation=evaluation))
        assert describe(check(from_tasks("job", evaluation=evaluation)))["predicted"]["notes"] == []

    def test_what_is_measured_may_be_taken_by_name(self, from_tasks: JobFile, folder: Path) -> None:
        evaluation = {"tasks": ["tested"], "task_folder": str(folder)}
        calibration = {"tasks": ["tested"], "split": "test"}
        prepared = check(from_tasks("job", calibration, evaluation=evaluation))
        (note,) = describe(prepared)["predicted"]["notes"]
        assert note.startswith("calibrated with what is measured: the test split of 'tested'")
        assert prepared.sources == {"tested (test)": SEQUENCES}


def test_task_files_are_sent_along(from_tasks: JobFile, folder: Path) -> None:
    spec, _ = validate(read_document(from_tasks("job")))
    assert spec is not None
    spec = resolve_paths(spec, folder)
    with _packed(spec) as packed:
        sent = packed / "calibration-task_folder"
        assert sorted(p.name for p in sent.glob("*.yaml")) == ["ships.yaml", "tested.yaml"]
        again, _ = validate(read_document(packed / "job.yaml"))
        assert again is not None and again.calibration is not None
        assert again.calibration.task_folder == Path(sent.name)
