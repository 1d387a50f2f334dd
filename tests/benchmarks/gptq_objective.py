"""GPTQ layer by layer beside llm-compressor: the same weights, the same Hessians, one objective.

    python -m tests.benchmarks.gptq_objective --model FOLDER --calibration FILE \
        --peer-python PEER/bin/python

Each linear of the blocks named is solved on its own, under each scheme, from the Hessian of the
unquantized model's inputs. What is compared is trace((W - Q) H (W - Q)^T), in float64: ours with
ranges from the extremes, ours with searched ranges, and plain rounding, each as a part of
llm-compressor's; the mean over linears, and the range.

The peer runs in an environment of its own (llmcompressor==0.14.0.1).
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from quantcore.affine import Qparams, choose_qparams, dequantize, quantize, search_qparams
from quantcore.gptq import GptqConfig, factorize, solve
from quantcore.recorder import Recorder
from quantcore.schemes import Scheme
from tests.benchmarks.gptq_cpu import CHARACTERS, windows
from tests.peers.exchange import Case, run_linears

SCHEMES = (
    Scheme(name="int4", group_size=64),
    Scheme(name="int4"),
    Scheme(name="int4", group_size=64, zero_point="int"),
    Scheme(name="int8"),
    Scheme(name="int8", zero_point="int"),
    Scheme(name="float8"),
)


def main() -> None:
    options = _options()
    torch.set_num_threads(1)
    cases = list(_cases(options))
    with tempfile.TemporaryDirectory() as scratch:
        found = run_linears(options.peer_python, cases, Path(scratch))
    results = {}
    for scheme in SCHEMES:
        ratios: dict[str, list[float]] = {"minmax": [], "search": [], "rtn": [], "same codes": []}
        for case in (case for case in cases if case.scheme == scheme):
            for name, ratio in _compare(case, found[f"{case.name}.gptq"]).items():
                ratios[name].append(ratio)
        results[scheme.label()] = {
            name: [statistics.fmean(values), min(values), max(values)]
            for name, values in ratios.items()
            if values
        }
        print(scheme.label(), json.dumps(results[scheme.label()]), flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


def _cases(options: argparse.Namespace) -> Iterator[Case]:
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    text = options.calibration.read_text()[:CHARACTERS]
    ids = tokenizer(text, verbose=False)["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    blocks = {f".layers.{block}." for block in options.blocks}

    def wanted(name: str, module: nn.Module) -> bool:
        return isinstance(module, nn.Linear) and any(block in f".{name}" for block in blocks)

    recorder = Recorder(model, wanted, ranges=False)
    with recorder, torch.no_grad():
        for row in windows(ids, options.sequences, options.length):
            model(torch.tensor([row]))
    for name in recorder:
        moments = recorder[name].moments
        assert moments is not None
        w_OI = model.get_submodule(name).weight.detach()
        for number, scheme in enumerate(SCHEMES):
            yield Case(f"{name}/{number}", scheme, w_OI, moments.mean())


def _compare(case: Case, theirs_OI: Tensor) -> dict[str, float]:
    w_OI, scheme = case.w_OI, case.scheme
    assert case.h_II is not None
    factor = factorize(case.h_II, GptqConfig())

    def solved(qparams: Qparams) -> Tensor:
        return dequantize(solve(w_OI, qparams, scheme, factor, 128), qparams, scheme)

    extremes = choose_qparams(w_OI, scheme, stored=w_OI.dtype)
    minmax_OI = solved(extremes)
    rounded_OI = dequantize(quantize(w_OI, extremes, scheme), extremes, scheme)
    theirs = _objective(case, theirs_OI)
    ratios = {
        "minmax": _objective(case, minmax_OI) / theirs,
        "rtn": _objective(case, rounded_OI) / theirs,
        "same codes": (minmax_OI == theirs_OI).double().mean().item(),
    }
    if scheme.searchable:
        searched = search_qparams(w_OI, factor.column_costs(), scheme, stored=w_OI.dtype)
        ratios["search"] = _objective(case, solved(searched)) / theirs
    return ratios


def _objective(case: Case, q_OI: Tensor) -> float:
    assert case.h_II is not None
    delta_OI = case.w_OI.double() - q_OI.double()
    return ((delta_OI @ case.h_II.double()) * delta_OI).sum().item()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--peer-python", required=True)
    parser.add_argument("--blocks", type=int, nargs="+", default=[0, 14, 29])
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    return parser.parse_args()


if __name__ == "__main__":
    main()
