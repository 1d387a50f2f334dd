"""Every scheme by every method on a real model: what it stores, and what it loses.

    python -m tests.benchmarks.scheme_table --model FOLDER --calibration FILE --evaluation FILE \
        --json OUT.json --markdown OUT.md [--rows "int4*"] [--shared] [--device cuda]

Each row is a job of its own (scheme_rows.py), run in this process and measured on what it
published, in the native format, with activations rounded as while serving:

    bits              of all that is stored of quantized linears, for each of their weights
    perplexity        token perplexity on the first 8,192 tokens of the evaluation text, windows of
                      1,024, float32 (gptq_cpu.py's protocol, and its calibration windows)
    output error      |y - y_quantized| / |y|, the mean over linears, as the job's report has it
    weight error      |W - Q| / |W|, the mean over linears, Q as an input before smoothing meets it

By default each job calibrates by itself, so that its blocks see inputs that came through its own
blocks. With --shared one job in int8 g32, which loses next to nothing, keeps its statistics for all
the others: no forward passes, and output errors on the very same inputs.

Rows that are in the JSON already are not done again. Under the table stands the order that the
rows should come in (scheme_rows.pairs), and which pairs keep to it: a difference of less than two
standard errors, over 64 pieces of the text, is told apart as level.
"""

import argparse
import fnmatch
import json
import math
import platform
import sys
import tempfile
import time
from collections.abc import Iterable
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from transformers import AutoTokenizer

from orchestrator.checks import Prepared, check
from orchestrator.driver import run_job
from orchestrator.executors import InProcessExecutor
from orchestrator.fetch import fetch
from orchestrator.loop import Observer
from tests.benchmarks.gptq_cpu import CHARACTERS, windows
from tests.benchmarks.perplexity import WINDOW, token_losses
from tests.benchmarks.scheme_rows import Row, pairs, rows
from tests.benchmarks.verdicts import as_markdown, judge
from workers.layout import block_key
from workers.loading import load
from workers.plan import GroupPlan
from workers.publish import decoded_weights, published_tensors, read_record
from workers.store import Store, open_store

ORIGINAL = "original"
KEEPER = {"scheme": "int8", "group_size": 32, "method": "rtn"}
PIECES = 64  # that the evaluated text is cut into, for standard errors

Results = dict[str, dict[str, Any]]


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    known = _known(options)
    chosen = _chosen(options.rows)
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(options, options.work or Path(scratch))
        if ORIGINAL not in known["rows"]:
            known["rows"][ORIGINAL] = bench.original()
            _keep(options, known)
        for row in chosen:
            if row.name not in known["rows"]:
                known["rows"][row.name] = bench.measure(row)
                _keep(options, known)
                print(row.name, json.dumps(_short(known["rows"][row.name])), flush=True)
    print(report(known))


def _chosen(patterns: Iterable[str]) -> list[Row]:
    for pattern in patterns:
        if not any(fnmatch.fnmatch(row.name, pattern) for row in rows()):
            names = "\n".join(row.name for row in rows())
            sys.exit(f"no row is like '{pattern}'; there are:\n{names}")
    return [row for row in rows() if any(fnmatch.fnmatch(row.name, one) for one in patterns)]


def report(known: dict[str, Any]) -> str:
    verdicts = judge(pairs(), known["rows"])
    return as_markdown([(row.name, row.form, row.method) for row in rows()], known, verdicts)


class Bench:
    """What all rows share: the texts, and where jobs may write."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self._options, self._folder = options, folder
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        text = options.calibration.read_text()[:CHARACTERS]
        ids = tokenizer(text, verbose=False)["input_ids"]
        self._texts = folder / "calibration.jsonl"
        sequences = windows(ids, options.sequences, options.length)
        self._texts.write_text("".join(json.dumps({"input_ids": ids}) + "\n" for ids in sequences))
        text = options.evaluation.read_text()[: options.tokens * 6]
        self._heldout = tokenizer(text, verbose=False)["input_ids"]

    def original(self) -> dict[str, Any]:
        model = self._options.model
        return {"file_bytes": _file_bytes(model), **self._losses(model)}

    def measure(self, row: Row) -> dict[str, Any]:
        with tempfile.TemporaryDirectory(dir=self._folder) as scratch:
            prepared = check(self._job(Path(scratch), dict(row.quantization), self._calibration()))
            done = run_job(prepared, _here(prepared), Observer())
            store = open_store(done.store)
            out = Path(scratch) / "out"
            fetch(store, out)
            lines = done.report["layers"]
            return {
                "bits": stored_bits(prepared, store),
                "file_bytes": _file_bytes(out),
                "output_error": _mean(line["relative_output_error"] for line in lines),
                "weight_error": _mean(weight_errors(prepared, store)),
                "seconds": done.report["seconds"]["quantize"],
                "fallbacks": len(done.report["fallbacks"]),
                **self._losses(out),
            }

    def _losses(self, folder: Path) -> dict[str, Any]:
        start = time.perf_counter()
        model = load(folder, torch.float32, self._options.device)
        losses = token_losses(model, self._heldout, self._options.tokens)
        return {
            "perplexity": math.exp(losses.mean().item()),
            "losses": _pieces(losses),
            "evaluation_seconds": time.perf_counter() - start,
        }

    def _calibration(self) -> dict[str, Any]:
        options = self._options
        texts = {
            "jsonl": str(self._texts),
            "field": "input_ids",
            "sequences": options.sequences,
            "length": options.length,
        }
        if not options.shared:
            return texts
        keeping = self._folder / "keeping"
        keeping.mkdir(exist_ok=True)
        prepared = check(self._job(keeping, KEEPER, {**texts, "keep_statistics": True}))
        return {"statistics": run_job(prepared, _here(prepared), Observer()).store}

    def _job(self, folder: Path, quantization: dict[str, Any], calibration: dict[str, Any]) -> Path:
        job = {
            "name": "row",
            "model": {"path": str(self._options.model.absolute())},
            "quantization": quantization,
            "calibration": calibration,
            "workers": {
                "count": 1,
                "threads": self._options.threads,
                "kind": self._options.device,
            },
            "output": {"store": str(folder / "store"), "format": "native"},
        }
        file = folder / "job.yaml"
        file.write_text(yaml.safe_dump(job))
        return file


def stored_bits(prepared: Prepared, store: Store) -> float:
    """Bits in the artifact for each quantized weight: codes, scales, zero points, input factors."""
    plan = prepared.plan
    num_bytes = weights = 0
    for index, block in enumerate(plan.blocks):
        layers = {layer.name: layer for layer in block.quantized()}
        tensors = read_record(store, block_key(index))["tensors"] if layers else {}
        for name, size in tensors.items():
            owner, _, part = name.rpartition(".")
            num_bytes += size if owner in layers and part != "bias" else 0
        weights += sum(layer.out_features * layer.in_features for layer in layers.values())
    return 8 * num_bytes / weights


def weight_errors(prepared: Prepared, store: Store) -> Iterable[float]:
    """Of each linear. What SmoothQuant took from a norm is handed back to it first."""
    plan = prepared.plan
    for index, block in enumerate(plan.blocks):
        if not any(block.quantized()):
            continue
        tensors = published_tensors(store, block_key(index))
        new = decoded_weights(tensors, plan, index, torch.device("cpu"))
        for group in block.groups:
            factor_I = _folded(group, prepared, new)
            for layer in group.quantized():
                ((_, w_OI),) = prepared.source.read([f"{layer.name}.weight"])
                q_OI = new[f"{layer.name}.weight"].float() / factor_I
                yield ((w_OI.float() - q_OI).norm() / w_OI.float().norm()).item()


def _folded(group: GroupPlan, prepared: Prepared, new: dict[str, Tensor]) -> Tensor:
    norm = group.smoothed
    if norm is None:
        return torch.ones(1)
    name, offset = f"{norm.name}.weight", 1.0 if norm.rule == "offset" else 0.0
    ((_, before_I),) = prepared.source.read([name])
    return (before_I.float() + offset) / (new[name].float() + offset)


def _here(prepared: Prepared) -> Any:
    return lambda plan: InProcessExecutor(plan, [prepared.device])


def _file_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _pieces(losses: Tensor) -> list[float]:
    """The mean loss of each piece of the text."""
    parts = losses.flatten().tensor_split(PIECES)
    return [round(part.mean().item(), 6) for part in parts]


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)


def _short(result: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in result.items() if name != "losses"}


def _known(options: argparse.Namespace) -> dict[str, Any]:
    """What the JSON holds. Rows of other texts, or of another machine, are not added to."""
    protocol = _protocol(options)
    if options.json is None or not options.json.exists():
        return {"protocol": protocol, "rows": {}}
    known: dict[str, Any] = json.loads(options.json.read_text())
    for name, value in protocol.items():
        if known["protocol"].get(name) != value:
            sys.exit(
                f"{options.json} holds rows with {name} = {known['protocol'].get(name)}, not "
                f"{value}: name another file with --json"
            )
    return known


def _protocol(options: argparse.Namespace) -> dict[str, Any]:
    texts = (options.calibration, options.evaluation, options.model / "config.json")
    device = platform.processor() or platform.machine()
    return {
        "model": options.model.name,
        "digests": [sha256(file.read_bytes()).hexdigest()[:16] for file in texts],
        "calibration": "shared" if options.shared else "own",
        "sequences": [options.sequences, options.length],
        "evaluated": [options.tokens, WINDOW],
        "device": device if options.device == "cpu" else torch.cuda.get_device_name(),
        "threads": options.threads,
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }


def _keep(options: argparse.Namespace, known: dict[str, Any]) -> None:
    if options.json:
        partial = options.json.with_suffix(".partial")
        partial.write_text(json.dumps(known, indent=1) + "\n")
        partial.replace(options.json)
    if options.markdown:
        options.markdown.write_text(report(known))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--evaluation", type=Path, required=True)
    parser.add_argument("--rows", nargs="+", default=["*"], help="by name: 'int4 sym *' and such")
    parser.add_argument("--shared", action="store_true", help="one calibration for all rows")
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=8192, help="that are evaluated")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, help="a folder that keeps shared statistics")
    parser.add_argument("--json", type=Path, help="figures so far, and where they are written")
    parser.add_argument("--markdown", type=Path, help="where to write the table")
    return parser.parse_args()


if __name__ == "__main__":
    main()
