"""Jobs that keep their statistics, and jobs that are made from them without texts."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from orchestrator.checks import check
from orchestrator.driver import run_job
from orchestrator.loop import Observer
from quantcore.errors import JobFaults, SpecError, StoreError
from tests.command import quantfleet
from tests.conftest import BLOCKS
from tests.faults import KillingExecutor, schedule
from tests.test_orchestrator_job import model_bytes, run_here
from workers.layout import STATISTICS_INDEX

JobFile = Callable[..., Path]

INT4 = {"scheme": "int4", "group_size": 32, "method": "gptq"}
TEXTS = {"sequences": 8, "length": 32}


@pytest.fixture
def keeping(job_file: JobFile, text_file: Path) -> Callable[..., Path]:
    """A job that keeps statistics; blocks are rounded alike, so that inputs do not differ."""

    def write(name: str, **sections: Any) -> Path:
        calibration = {"text": str(text_file), **TEXTS, "keep_statistics": True}
        return job_file(name, **{"quantization": INT4, "calibration": calibration, **sections})

    return write


def statistics_of(store: str) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted((Path(store) / "statistics").iterdir())}


def from_statistics(store: str) -> dict[str, Any]:
    return {"calibration": {"statistics": store}}


def test_keeping_changes_no_byte_of_the_artifact(job_file: JobFile, keeping: JobFile) -> None:
    kept = run_here(keeping("kept"))
    assert model_bytes(kept.store) == model_bytes(run_here(job_file("plain")).store)
    assert len(statistics_of(kept.store)) == 4 * BLOCKS + 1


def test_the_same_job_from_its_own_statistics_has_the_same_bytes(
    job_file: JobFile, keeping: JobFile
) -> None:
    kept = run_here(keeping("kept"))
    again = run_here(job_file("again", quantization=INT4, **from_statistics(kept.store)), workers=2)
    assert model_bytes(again.store) == model_bytes(kept.store)
    assert again.report["statistics"]["job"] == "kept"
    for ours, theirs in zip(again.report["layers"], kept.report["layers"], strict=True):
        assert ours == theirs


@pytest.mark.parametrize(
    "quantization",
    [
        {"scheme": "int8", "method": "gptq"},
        {"scheme": "int8_dynamic", "method": "smoothquant"},
        {"scheme": "int8_static", "method": "smoothquant", "smoothquant": {"rounding": "gptq"}},
        {"scheme": "int4", "group_size": 32, "method": "rtn"},
    ],
    ids=str,
)
def test_other_schemes_from_the_same_statistics(
    job_file: JobFile, keeping: JobFile, quantization: dict[str, Any]
) -> None:
    """The first block's inputs do not hang on the scheme: its bytes are those of a job of its own.

    Later blocks differ: their inputs came through the other job's quantized blocks.
    """
    kept = run_here(keeping("kept")).store
    texts = run_here(job_file("texts", quantization=quantization)).store
    statistics = run_here(job_file("other", quantization=quantization, **from_statistics(kept)))
    first = [
        next(data for name, data in model_bytes(store).items() if name.startswith("block-00000"))
        for store in (texts, statistics.store)
    ]
    assert first[0] == first[1]
    assert all(0 < line["relative_output_error"] < 0.6 for line in statistics.report["layers"])


def test_losses_change_no_statistics(keeping: JobFile) -> None:
    whole = run_here(keeping("whole")).store
    for seed in (1, 2, 3):
        result = run_job(
            check(keeping(f"seed-{seed}")),
            lambda plan, seed=seed: KillingExecutor(plan, 2, schedule(seed, BLOCKS)),
            Observer(),
        )
        assert model_bytes(result.store) == model_bytes(whole)
        ours, theirs = statistics_of(result.store), statistics_of(whole)
        del ours["index.json"], theirs["index.json"]  # which names its job
        assert ours == theirs


def test_a_block_that_is_skipped_has_statistics_too(job_file: JobFile, keeping: JobFile) -> None:
    skipping = {**INT4, "overrides": [{"match": "*.layers.1.*", "skip": True}]}
    kept = run_here(keeping("kept", quantization=skipping)).store
    assert len(statistics_of(kept)) == 4 * BLOCKS + 1
    result = run_here(job_file("all", quantization=INT4, **from_statistics(kept)))
    assert len(result.report["layers"]) == 7 * BLOCKS


def test_bands_of_wide_hessians_are_kept_whole(
    job_file: JobFile, keeping: JobFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = statistics_of(run_here(keeping("whole")).store)
    monkeypatch.setattr("orchestrator.block.BAND_BYTES", 1)
    banded = statistics_of(run_here(keeping("banded"), workers=3).store)
    del banded["index.json"], whole["index.json"]
    assert banded == whole


class TestRefusals:
    def test_a_store_without_statistics(self, job_file: JobFile) -> None:
        plain = run_here(job_file("plain")).store
        with pytest.raises(JobFaults, match=r"calibration.statistics: .*keep_statistics: true"):
            check(job_file("next", **from_statistics(plain)))
        with pytest.raises(JobFaults, match=r"calibration.statistics: .*keep_statistics: true"):
            check(job_file("next", **from_statistics("/nowhere/job")))

    def test_a_damaged_index(self, job_file: JobFile, keeping: JobFile) -> None:
        kept = run_here(keeping("kept")).store
        (Path(kept) / STATISTICS_INDEX).write_text('{"version": 1, "blocks": 3}')
        with pytest.raises(JobFaults, match="is not an index of statistics"):
            check(job_file("next", **from_statistics(kept)))

    def test_a_file_name_that_leads_out(self, job_file: JobFile, keeping: JobFile) -> None:
        kept = run_here(keeping("kept")).store
        index = json.loads((Path(kept) / STATISTICS_INDEX).read_text())
        index["blocks"][0][0]["file"] = "../../secret"
        (Path(kept) / STATISTICS_INDEX).write_text(json.dumps(index))
        with pytest.raises(JobFaults, match="leads out of its folder"):
            check(job_file("next", **from_statistics(kept)))

    def test_damaged_statistics(self, job_file: JobFile, keeping: JobFile) -> None:
        kept = run_here(keeping("kept")).store
        one = next((Path(kept) / "statistics").glob("00001.2.*"))
        one.write_bytes(one.read_bytes()[:-8] + b"\0" * 8)
        with pytest.raises(StoreError, match=r"00001\.2\..* is not what was kept"):
            run_here(job_file("next", **from_statistics(kept)))

    def test_another_architecture(
        self, job_file: JobFile, keeping: JobFile, model_folder: Callable[..., Path]
    ) -> None:
        kept = run_here(keeping("kept")).store
        other = {"model": {"path": str(model_folder("cohere"))}}
        with pytest.raises(JobFaults, match="of a model with other linears"):
            check(job_file("next", **other, **from_statistics(kept)))

    def test_other_weights(
        self,
        job_file: JobFile,
        keeping: JobFile,
        model_folder: Callable[..., Path],
        tmp_path: Path,
    ) -> None:
        kept = run_here(keeping("kept")).store
        other = tmp_path / "other"
        shutil.copytree(model_folder("llama"), other)
        tensors = load_file(other / "model.safetensors")
        tensors["model.norm.weight"] = torch.ones_like(tensors["model.norm.weight"])
        save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
        job = job_file("next", model={"path": str(other)}, **from_statistics(kept))
        with pytest.raises(SpecError, match="same shapes and other weights"):
            run_here(job)
        assert not (tmp_path / "store" / "next").exists()

    @pytest.mark.parametrize("more", [{"sequences": 8}, {"shards": 2}, {"keep_statistics": True}])
    def test_keys_that_are_about_texts(self, job_file: JobFile, more: dict[str, Any]) -> None:
        calibration = {"statistics": "/store/job", **more}
        with pytest.raises(JobFaults, match="drop the other keys"):
            check(job_file("next", calibration=calibration))

    def test_other_statistics_under_the_same_name(
        self, job_file: JobFile, keeping: JobFile, tmp_path: Path
    ) -> None:
        kept = run_here(keeping("kept")).store
        few = {"text": str(tmp_path / "t"), **TEXTS, "keep_statistics": True, "seed": 3}
        shutil.copy(Path(check(keeping("x")).spec.calibration.text), tmp_path / "t")
        others = run_here(keeping("others", calibration=few)).store
        run_here(job_file("next", quantization=INT4, **from_statistics(kept)))
        with pytest.raises(SpecError, match=r"calibration.statistics: this job was begun"):
            run_here(job_file("next", quantization=INT4, **from_statistics(others)))


def test_what_they_take_in_the_store_is_predicted(keeping: JobFile) -> None:
    prepared = check(keeping("kept"))
    predicted = prepared.prediction.store["statistics"]
    files = list((Path(run_here(keeping("kept")).store) / "statistics").glob("*.safetensors"))
    taken = sum(file.stat().st_size for file in files)
    headers = 1024 * len(files)
    # the texts are so short here that the sample falls short of what is usual
    assert taken - headers < predicted
    sample = sum(load_file(file)["sample"].nbytes for file in files)
    assert predicted < taken - sample + 12 * 2**20


def test_statistics_in_s3_serve_a_job_in_a_folder(
    job_file: JobFile, keeping: JobFile, bucket: str
) -> None:
    kept = run_here(keeping("kept", output={"store": f"{bucket}/jobs"}))
    assert kept.store == f"{bucket}/jobs/kept"
    later = run_here(job_file("later", quantization=INT4, **from_statistics(kept.store)))
    whole = run_here(keeping("whole"))
    assert model_bytes(later.store) == model_bytes(whole.store)


def test_a_job_over_statistics_is_taken_up_from_its_store(
    job_file: JobFile, keeping: JobFile
) -> None:
    kept = run_here(keeping("kept")).store
    job = job_file("later", quantization=INT4, **from_statistics(kept))
    store = Path(run_here(job).store)
    for record in [store / "manifest.json", store / "ledger" / "block-00001.json"]:
        record.unlink()
    outcome = quantfleet("resume", "--in-process", str(store))
    assert outcome.code == 0, outcome
    assert "2 of 3 blocks are finished" in outcome.err
    assert model_bytes(str(store)) == model_bytes(kept)
