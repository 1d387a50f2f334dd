"""Rounding, GPTQ and SmoothQuant beside llm-compressor 0.14.0.1, on the same weights and inputs.

    QUANTFLEET_LLMC_PYTHON=/path/to/its/python pytest tests/test_llmcompressor_agreement.py

It pins versions of its own, so it runs in another environment (tests/peers), and files go to and
fro. In float32 both do the same sums: scales, codes and solutions are equal to the bit. On bfloat16
weights it divides in bfloat16 where we divide in float32: ours are nearer, which is held too.

Shape suffixes: O = rows of a weight, G = groups per row, I = inputs, T = tokens.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from orchestrator.fetch import fetch
from quantcore.affine import Qparams, choose_qparams, dequantize, quantize, search_qparams
from quantcore.gptq import GptqConfig, factorize, solve
from quantcore.ranges import Ranges
from quantcore.recorder import Recorder
from quantcore.schemes import Scheme
from quantcore.smoothing import Reader, factors
from tests.conftest import save_model
from tests.peers.exchange import PYTHON, Case, run_linears, run_smooth
from tests.references import correlated_inputs, output_error, second_moment
from tests.test_orchestrator_job import run_here
from workers.loading import load
from workers.store import open_store

ROWS, WIDTH = 96, 192
FORMS = {
    scheme.label(): scheme
    for scheme in (
        Scheme(name="int4", group_size=32),
        Scheme(name="int4", group_size=64),
        Scheme(name="int4"),
        Scheme(name="int4", group_size=64, zero_point="int"),
        Scheme(name="int4", zero_point="int"),
        Scheme(name="int8"),
        Scheme(name="int8", group_size=64),
        Scheme(name="int8", zero_point="int"),
        Scheme(name="float8"),
        Scheme(name="float8", per_tensor=True),
    )
}
DTYPES = (torch.float32, torch.bfloat16)
ALPHA = 0.5

all_forms = pytest.mark.parametrize("form", FORMS)


@pytest.fixture(scope="module")
def python() -> str:
    found = os.environ.get(PYTHON)
    if not found:
        pytest.skip(f"{PYTHON} does not name the Python of an environment with llm-compressor")
    return found


@dataclass(frozen=True, slots=True)
class Both:
    """A case, and what each side made of it."""

    case: Case
    ours: Qparams
    theirs: Qparams
    their_codes_OI: Tensor
    their_gptq_OI: Tensor

    @property
    def scheme(self) -> Scheme:
        return self.case.scheme

    def our_codes(self) -> Tensor:
        return quantize(self.case.w_OI, self.ours, self.scheme)

    def our_gptq(self, qparams: Qparams) -> Tensor:
        assert self.case.h_II is not None
        factor = factorize(self.case.h_II, GptqConfig())
        codes_OI = solve(self.case.w_OI, qparams, self.scheme, factor, 128)
        return dequantize(codes_OI, qparams, self.scheme)

    def objective(self, q_OI: Tensor) -> float:
        """trace((W - Q) H (W - Q)^T) in float64"""
        assert self.case.h_II is not None
        delta_OI = self.case.w_OI.double() - q_OI.double()
        return output_error(delta_OI, self.case.h_II.double().numpy())


@pytest.fixture(scope="module")
def both(
    python: str, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, torch.dtype], Both]:
    cases = {}
    for number, (label, scheme) in enumerate(FORMS.items()):
        h_II = torch.tensor(second_moment(correlated_inputs(1024, WIDTH, number))).float()
        generator = torch.Generator().manual_seed(number)
        w_OI = torch.randn(ROWS, WIDTH, generator=generator) * 0.05
        w_OI[3, 5] = 1.0
        for dtype in DTYPES:
            cases[label, dtype] = Case(f"{number}-{dtype}", scheme, w_OI.to(dtype), h_II)
    found = run_linears(python, list(cases.values()), tmp_path_factory.mktemp("peer"))

    def of(label: str, dtype: torch.dtype) -> Both:
        case = cases[label, dtype]
        ours = choose_qparams(case.w_OI, case.scheme, stored=dtype)
        scale, zero = found[f"{case.name}.scale"], found[f"{case.name}.zero"]
        assert scale.dtype == dtype
        theirs = Qparams(
            scale.float().reshape(-1, ours.scale_OG.shape[1]).expand(ROWS, -1),
            zero.reshape(-1, ours.zero_OG.shape[1]).expand(ROWS, -1),
        )
        codes_OI, gptq_OI = found[f"{case.name}.codes"], found[f"{case.name}.gptq"]
        return Both(case, ours, theirs, codes_OI, gptq_OI)

    return of


@all_forms
def test_float32_weights_are_rounded_to_the_same_bits(
    both: Callable[[str, torch.dtype], Both], form: str
) -> None:
    pair = both(form, torch.float32)
    assert torch.equal(pair.ours.scale_OG, pair.theirs.scale_OG)
    assert torch.equal(pair.ours.zero_OG, pair.theirs.zero_OG)
    assert torch.equal(pair.our_codes(), pair.their_codes_OI)


@all_forms
def test_bfloat16_weights_are_rounded_nearer(
    both: Callable[[str, torch.dtype], Both], form: str
) -> None:
    """A quotient in bfloat16 has 8 bits: of an 8-bit code it may be off by half a step."""
    pair = both(form, torch.bfloat16)
    w_OI = pair.case.w_OI.float()
    apart = (pair.ours.scale_OG / pair.theirs.scale_OG - 1).abs().max()
    assert apart == 0 if pair.scheme.symmetric else apart <= 2**-7  # a difference and a quotient
    ours_OI = dequantize(pair.our_codes(), pair.ours, pair.scheme)
    theirs_OI = dequantize(pair.their_codes_OI, pair.theirs, pair.scheme)
    assert (w_OI - ours_OI).norm() <= (w_OI - theirs_OI).norm()
    if pair.scheme.symmetric:  # on one grid no weight is nearer in theirs
        assert ((w_OI - ours_OI).abs() <= (w_OI - theirs_OI).abs()).all()


@all_forms
def test_gptq_finds_the_same_solution_of_float32_weights(
    both: Callable[[str, torch.dtype], Both], form: str
) -> None:
    """Its act-order and damping are ours; a tie may fall the other way after other last bits."""
    pair = both(form, torch.float32)
    ours_OI = pair.our_gptq(pair.ours)
    assert (ours_OI == pair.their_gptq_OI).float().mean() > 0.995
    assert pair.objective(ours_OI) == pytest.approx(pair.objective(pair.their_gptq_OI), rel=2e-3)


@all_forms
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gptq_moves_outputs_no_more(
    both: Callable[[str, torch.dtype], Both], form: str, dtype: torch.dtype
) -> None:
    pair = both(form, dtype)
    theirs = pair.objective(pair.their_gptq_OI)
    assert pair.objective(pair.our_gptq(pair.ours)) <= 1.005 * theirs
    if pair.scheme.searchable:
        assert pair.case.h_II is not None
        importance_I = factorize(pair.case.h_II, GptqConfig()).column_costs()
        searched = search_qparams(pair.case.w_OI, importance_I, pair.scheme, stored=dtype)
        most = 0.95 if pair.scheme.bits == 4 else 1.01  # 8 bits leave a search little to find
        assert pair.objective(pair.our_gptq(searched)) <= most * theirs


@dataclass(frozen=True, slots=True)
class Smoothed:
    """The first block of a model, smoothed by both sides with the same alpha."""

    source: dict[str, Tensor]
    ours: dict[str, Tensor]
    theirs: dict[str, Tensor]
    ranges: dict[str, Ranges]  # of linears' inputs, unquantized
    inputs: dict[str, Tensor]  # of linears, (T, I)


LOUD = (5, 40)
READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
BLOCK = "model.layers.0."
all_norms = pytest.mark.parametrize("norm", READERS)


@pytest.fixture(scope="module")
def smoothed(python: str, tmp_path_factory: pytest.TempPathFactory) -> Smoothed:
    folder = tmp_path_factory.mktemp("smooth")
    model = save_model("llama", folder / "model")
    tensors = load_file(model / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("layernorm.weight"):
            tensor[list(LOUD)] *= 30
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})

    ids_BL = torch.randint(2, 320, (8, 48), generator=torch.Generator().manual_seed(1))
    texts = folder / "texts.jsonl"
    texts.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in ids_BL.tolist()))
    run_smooth(python, model, texts, ALPHA, folder / "theirs")
    job = {
        "model": {"path": str(model)},
        "quantization": {
            "scheme": "int8_dynamic",
            "method": "smoothquant",
            "smoothquant": {"alpha": ALPHA},
        },
        "calibration": {"jsonl": str(texts), "field": "input_ids", "sequences": 8, "length": 48},
        "workers": {"count": 1},
        "output": {"store": str(folder / "store")},
    }
    (folder / "job.yaml").write_text(json.dumps(job))  # JSON is YAML
    fetch(open_store(run_here(folder / "job.yaml").store), folder / "ours")

    inputs: dict[str, Tensor] = {}
    original = load(model, torch.float32)
    for readers in READERS.values():
        for reader in readers:
            module = original.get_submodule(BLOCK + reader)
            module.register_forward_pre_hook(
                lambda _, args, reader=reader: inputs.__setitem__(reader, args[0].flatten(0, 1))
            )
    recorder = Recorder(original)
    with recorder, torch.no_grad():
        original(ids_BL)
    ranges = {}
    for readers in READERS.values():
        for reader in readers:
            found = recorder[BLOCK + reader].ranges
            assert found is not None
            ranges[reader] = found
    return Smoothed(tensors, _tensors(folder / "ours"), _tensors(folder / "theirs"), ranges, inputs)


def _tensors(folder: Path) -> dict[str, Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def _factor(side: dict[str, Tensor], source: dict[str, Tensor], norm: str) -> Tensor:
    name = f"{BLOCK}{norm}.weight"
    return source[name] / side[name]


def _formula(smoothed: Smoothed, norm: str, ranges: Ranges) -> Tensor:
    scheme = Scheme(name="int8_dynamic")
    weights = (smoothed.source[f"{BLOCK}{reader}.weight"] for reader in READERS[norm])
    return factors(ranges, [Reader(w_OI, scheme) for w_OI in weights], ALPHA)


@all_norms
def test_smoothing_factors_are_the_same_but_for_what_an_inputs_size_is(
    smoothed: Smoothed, norm: str
) -> None:
    """Ours is max|x|, as in the paper; llm-compressor's is half of max(x) - min(x)."""
    ranges = smoothed.ranges[READERS[norm][0]]
    half_I = (ranges.high_I - ranges.low_I) / 2
    theirs = Ranges(-half_I, half_I, ranges.sample_SI, ranges.rows)
    ours_I = _factor(smoothed.ours, smoothed.source, norm)
    theirs_I = _factor(smoothed.theirs, smoothed.source, norm)
    torch.testing.assert_close(ours_I, _formula(smoothed, norm, ranges), rtol=1e-5, atol=0)
    torch.testing.assert_close(theirs_I, _formula(smoothed, norm, theirs), rtol=1e-5, atol=0)
    ratio_I = theirs_I / ours_I
    assert ratio_I.min() > 0.5**0.5 - 1e-5 and ratio_I.max() < 1 + 1e-5


@all_norms
def test_smoothed_outputs_move_no_more(smoothed: Smoothed, norm: str) -> None:
    ours, theirs = (
        sum(_moved(smoothed, side, norm, reader) for reader in READERS[norm])
        for side in (smoothed.ours, smoothed.theirs)
    )
    unsmoothed = sum(_moved(smoothed, None, norm, reader) for reader in READERS[norm])
    assert ours < 0.5 * unsmoothed
    assert ours <= 1.02 * theirs


def _moved(smoothed: Smoothed, side: dict[str, Tensor] | None, norm: str, reader: str) -> float:
    """|y - y_quantized|^2 / |y|^2 in float64, each token's inputs rounded to 8 bits."""
    x_TI = smoothed.inputs[reader].double()
    w_OI = smoothed.source[f"{BLOCK}{reader}.weight"].double()
    if side is None:
        factor_I = torch.ones(x_TI.shape[1], dtype=torch.float64)
        scale_O1 = w_OI.abs().amax(1, keepdim=True) / 127.5
        q_OI = (w_OI / scale_O1).round().clamp(-128, 127) * scale_O1
    else:
        factor_I = _factor(side, smoothed.source, norm).double()
        scale_O1 = side[f"{BLOCK}{reader}.weight_scale"].double()
        q_OI = side[f"{BLOCK}{reader}.weight"].double() * scale_O1
    served_TI = x_TI / factor_I
    step_T1 = served_TI.abs().amax(1, keepdim=True) / 127.5
    served_TI = (served_TI / step_T1).round().clamp(-128, 127) * step_T1
    y_TO = x_TI @ w_OI.t()
    return ((y_TO - served_TI @ q_OI.t()).norm() / y_TO.norm()).square().item()
