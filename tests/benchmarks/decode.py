"""Whole models that decode: bfloat16 beside every scheme, each of one run.

    python -m tests.benchmarks.decode --shape llama-8b --compile --json OUT.json
    python -m tests.benchmarks.decode --model FOLDER --text FILE

For every row of ROWS a model is made anew, its linears are quantized, the output head's with them,
and one token after the other is taken from it greedily, out of a static cache: on CUDA each step is
the replay of one CUDA graph, of torch.compile's code with `--compile`, else of the modules with our
own kernels for norms, rotary embeddings and gated products. Nothing comes to the host in between.
Linears that are handed one input are joined, bfloat16's too; `--apart` leaves them. A step's
attention is ours in every row; `--attention torch` leaves it to torch.

    tokens a second   all sequences of the batch; percentiles over repeats of `--tokens` steps
    GB/s              bytes of all linears, the head's with them, read once a step
    size              those bytes: the embedding does not count
    peak              the most memory that prefill and decode had
    prefill           one forward of the prompt, causal: milliseconds; on CUDA, a graph's replay

First the gate: the logits that a few steps leave must be those of one plain forward over the same
tokens; a row that misses ends the run. Weights are random with `--shape`. With `--model` they are a
model's own, and a second table shows what becomes of its text: perplexity (perplexity.py), and the
greedy continuation of the text's first `--prompt` tokens beside bfloat16's.
"""

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from quantcore.errors import QuantizationError
from quantcore.inductor import recommended_inductor_settings
from quantcore.joining import Joined, join_linears
from quantcore.quantize import quantize_
from quantcore.recorder import Recorder
from quantcore.schemes import SCHEME_KINDS, resolve_scheme
from quantcore.tensors import Layout, QuantizedTensor
from tests.benchmarks import arguments
from tests.benchmarks.block_costs import SHAPES
from tests.benchmarks.perplexity import perplexity
from workers.decoding import Decoder, captured
from workers.fusing import fuse
from workers.kind import hardware_kind
from workers.loading import load

WHOLE = {  # blocks and vocabulary
    "llama-8b": {"num_hidden_layers": 32, "vocab_size": 128_256},
    "llama-70b": {"num_hidden_layers": 80, "vocab_size": 128_256},
    "smollm2-135m": {"num_hidden_layers": 30, "vocab_size": 49_152},
}
TUNED = "max-autotune-no-cudagraphs"
GATE_STEPS = 4
# Of the step's logits beside a plain forward's, relative: a token too few shows as 0.18 after so
# short a prompt, another order of them or none as 0.65 and more; 32 blocks of random weights make
# bfloat16 itself 0.05 off. Where activations are rounded as well, a last bit of bfloat16 may be a
# whole step of 8 bits, and a call of one token may have another scale.
GATE_PROMPT, MOST_OFF, MOST_OFF_ROUNDED = 8, 0.1, 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    scheme: str | None  # None: bfloat16
    group_size: int | Literal["channel", "tensor"] | None = None
    layouts: Mapping[str, Layout] = field(default_factory=dict)  # by device; plain elsewhere

    @property
    def label(self) -> str:
        return resolve_scheme(self.scheme, self.group_size).label() if self.scheme else "bf16"


# The layout of schemes whose kernels of ours read tiles, by device
TILED = {"cuda": Layout.TRITON_TILED}
INT4 = {"cpu": Layout.INT4_CPU, **TILED}
ROWS = (
    Row(scheme=None),
    Row(scheme="int4", group_size=64, layouts=INT4),
    Row(scheme="int4", group_size=128, layouts=INT4),
    Row(scheme="int8", layouts=TILED),
    Row(scheme="float8", layouts=TILED),
    Row(scheme="float8_dynamic"),
    Row(scheme="float8_dynamic", group_size="tensor"),
    Row(scheme="float8_static"),
    Row(scheme="int8_dynamic"),
    Row(scheme="int8_static"),
    Row(scheme="int8_dynamic_int4", layouts=TILED),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    label: str
    layout: str
    tokens_per_s: tuple[float, float, float]  # p20, p50, p80
    gb_per_s: float
    prefill_ms: float
    peak_bytes: int | None  # where it is a CPU's
    linear_bytes: int
    off: float  # the gate's
    continuation: list[int]
    perplexity: float | None


def measure(
    row: Row,
    make: Callable[[], nn.Module],
    ids_BT: Tensor,
    options: argparse.Namespace,
    text_ids: list[int] | None = None,
) -> Figures:
    model = make()
    kind = ids_BT.device.type
    layout = row.layouts.get(kind, Layout.PLAIN)
    if not options.compile:
        fuse(model)
    if row.scheme is not None:
        quantize_all(model, row, layout, ids_BT)
    if not options.apart:
        join_linears(model)
    if kind == "cuda":
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
    length = ids_BT.shape[1] + max(options.tokens, GATE_STEPS)
    decoder = Decoder(model, len(ids_BT), length, mode=options.compile, attention=options.attention)
    decoder.capture(ids_BT)
    off = gate(row, model, decoder, ids_BT)
    seconds, continuation = [], []
    for _ in range(options.repeats):
        decoder.begin(ids_BT)
        first = decoder.ids_B1.clone()
        seconds.append(timed(lambda: [decoder.step() for _ in range(options.tokens - 1)], kind))
    decoder.begin(ids_BT)
    taken = [first, *(decoder.step().clone() for _ in range(options.tokens - 1))]
    continuation = torch.cat(taken, dim=1)[0].tolist()
    prompt = captured(
        lambda: model(ids_BT, use_cache=False, logits_to_keep=1).logits, ids_BT.device
    )
    prefill = [timed(prompt, kind) for _ in range(options.repeats + 1)][1:]
    peak_bytes = torch.cuda.max_memory_allocated() if kind == "cuda" else None
    steps_per_s = sorted((options.tokens - 1) / duration for duration in seconds)
    fifth = len(steps_per_s) // 5
    marks = (steps_per_s[fifth], statistics.median(steps_per_s), steps_per_s[-1 - fifth])
    return Figures(
        label=row.label,
        layout=layout if row.scheme else "",
        tokens_per_s=tuple(len(ids_BT) * mark for mark in marks),  # type: ignore[arg-type]
        gb_per_s=linear_bytes(model) * marks[1] / 1e9,
        prefill_ms=statistics.median(prefill) * 1e3,
        peak_bytes=peak_bytes,
        linear_bytes=linear_bytes(model),
        off=off,
        continuation=continuation,
        perplexity=perplexity(model, text_ids, len(text_ids)) if text_ids else None,
    )


def quantize_all(model: nn.Module, row: Row, layout: Layout, ids_BT: Tensor) -> None:
    """Every linear, the head too, by plain rounding: where ranges are asked for, the prompt's."""

    def linears(_name: str, module: nn.Module) -> bool:
        return isinstance(module, nn.Linear)

    assert row.scheme is not None
    recorder = None
    if resolve_scheme(row.scheme, row.group_size).static:
        recorder = Recorder(model, linears, moments=False)
        with recorder:
            model(ids_BT, use_cache=False)
    quantize_(
        model,
        row.scheme,
        linears,
        group_size=row.group_size,
        layout=layout,
        recorder=recorder,
        inductor_settings=False,
    )


def gate(row: Row, model: nn.Module, decoder: Decoder, ids_BT: Tensor) -> float:
    """How far the step's logits are from those of one forward without a cache.

    The steps are handed tokens of the prompt's, since a random model's own are often all the same.
    """
    ids_BT = ids_BT[:, :GATE_PROMPT]
    more_BT = ids_BT[:, :GATE_STEPS]
    decoder.begin(ids_BT)
    for ids_B1 in more_BT.split(1, dim=1):
        decoder.ids_B1.copy_(ids_B1)
        decoder.step()
    whole_BT = torch.cat([ids_BT, more_BT], dim=1)
    wanted_BV = model(whole_BT, use_cache=False, logits_to_keep=1).logits[:, -1].float()
    off = ((decoder.logits_BV - wanted_BV).norm() / wanted_BV.norm()).item()
    rounded = row.scheme is not None and SCHEME_KINDS[row.scheme].activations is not None
    if not off < (MOST_OFF_ROUNDED if rounded else MOST_OFF):
        raise AssertionError(f"{row.label}: logits are off by {off:.3g} of a plain forward's")
    return off


def timed(run: Callable[[], object], kind: str) -> float:
    if kind == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if kind == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def linear_bytes(model: nn.Module) -> int:
    owners = [module for module in model.modules() if isinstance(module, nn.Linear | Joined)]
    weights = [module.weight for module in owners]
    return sum(w.num_bytes() if isinstance(w, QuantizedTensor) else w.nbytes for w in weights)


def random_model(config: Any, device: str) -> nn.Module:
    """In bfloat16, where it stays: no other copy of its weights is ever made.

    What a block adds is scaled down by the number of blocks, as GPT-2 begins (Radford et al. 2019,
    section 2.3): else a last bit that differs grows from block to block, and hides what is wrong.
    """
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    for name, weight in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight.data.mul_((2 * config.num_hidden_layers) ** -0.5)
    return model


@torch.no_grad()
def run(
    rows: Iterable[Row],
    make: Callable[[], nn.Module],
    ids_BT: Tensor,
    options: argparse.Namespace,
    text_ids: list[int] | None = None,
    kept: Callable[[list[Figures]], None] = lambda _: None,
) -> list[Figures]:
    """One model after the other; what a row's shapes do not allow is said and left out.

    `kept` is handed what there is after each, so that a run that is ended leaves something.
    """
    measured: list[Figures] = []
    for row in rows:
        try:
            measured.append(measure(row, make, ids_BT, options, text_ids))
        except QuantizationError as error:
            print(f"without {row.label}: {error}", flush=True)
            continue
        finally:
            torch._dynamo.reset()
            gc.collect()
            if ids_BT.device.type == "cuda":
                torch.cuda.empty_cache()
        print(f"gate: {row.label}, logits off by {measured[-1].off:.2g}", flush=True)
        print(line(measured[-1], measured[0]), flush=True)
        kept(measured)
    return measured


def table(measured: list[Figures]) -> str:
    lines = [
        "| scheme | layout | tokens/s (p20, p80) | to bf16 | GB/s | peak, GB | size, GB | "
        "prefill, ms | to bf16 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*lines, *(line(row, measured[0]) for row in measured)])


def line(row: Figures, base: Figures) -> str:
    low, middle, high = row.tokens_per_s
    peak = "" if row.peak_bytes is None else f"{row.peak_bytes / 1e9:.2f}"
    return (
        f"| {row.label} | {row.layout} | {middle:.2f} ({low:.2f}, {high:.2f}) | "
        f"{middle / base.tokens_per_s[1]:.2f} | {row.gb_per_s:.1f} | {peak} | "
        f"{row.linear_bytes / 1e9:.2f} | {row.prefill_ms:.1f} | "
        f"{base.prefill_ms / row.prefill_ms:.2f} |"
    )


def text_table(measured: list[Figures], decode: Callable[[list[int]], str]) -> str:
    """`alike`: how many of the continuation's first tokens are bfloat16's."""
    lines = ["| scheme | perplexity | alike | continuation |", "|---|---|---|---|"]
    for row in measured:
        pairs = zip(row.continuation, measured[0].continuation, strict=True)
        alike = next((n for n, (a, b) in enumerate(pairs) if a != b), len(row.continuation))
        words = " ".join(decode(row.continuation).split())
        lines.append(f"| {row.label} | {row.perplexity:.2f} | {alike} | {words} |")
    return "\n".join(lines)


def main() -> None:
    from transformers import AutoTokenizer, LlamaConfig

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=sorted(WHOLE), default="llama-8b")
    parser.add_argument("--blocks", type=arguments.count, help="all of them by default")
    parser.add_argument("--model", type=arguments.folder, help="a folder: a real model")
    parser.add_argument("--text", type=Path, help="what the real model reads")
    parser.add_argument("--text-tokens", type=arguments.count, default=8192)
    parser.add_argument(
        "--schemes",
        nargs="+",
        choices=sorted({r.scheme for r in ROWS if r.scheme}),
        help="names; all of them by default",
    )
    parser.add_argument("--batch", type=arguments.count, default=1)
    parser.add_argument("--prompt", type=arguments.count, default=128, help="tokens of the prompt")
    parser.add_argument("--tokens", type=arguments.count, default=200, help="tokens to decode")
    parser.add_argument("--repeats", type=arguments.count, default=5)
    parser.add_argument(
        "--compile",
        nargs="?",
        const="default",
        choices=("default", TUNED),
        help=f"by torch.compile; {TUNED} with the settings that we recommend takes minutes a row",
    )
    parser.add_argument(
        "--attention",
        choices=("ours", "torch"),
        default="ours",
        help="of steps: our kernel, on accelerators, or torch's",
    )
    parser.add_argument("--apart", action="store_true", help="linears of one input are not joined")
    parser.add_argument(
        "--device", type=arguments.device, default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--json", type=arguments.new_file)
    options = parser.parse_args()
    if (options.model is None) != (options.text is None):
        parser.error("write --model and --text together, or neither")
    rows = [r for r in ROWS if r.scheme in (None, *(options.schemes or [r.scheme]))]
    text_ids, make, tokenizer = None, None, None
    if options.model is not None:
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        text = options.text.read_text()[: options.text_tokens * 6]
        text_ids = tokenizer(text, verbose=False)["input_ids"][: options.text_tokens]
        ids_BT = torch.tensor(text_ids[: options.prompt])[None].repeat(options.batch, 1)
        make = lambda: load(options.model, torch.bfloat16, options.device)  # noqa: E731
    else:
        shape = SHAPES[options.shape] | WHOLE[options.shape]
        shape["num_hidden_layers"] = options.blocks or shape["num_hidden_layers"]
        config = LlamaConfig(max_position_embeddings=8192, tie_word_embeddings=False, **shape)
        ids_BT = torch.randint(0, config.vocab_size, (options.batch, options.prompt))
        make = lambda: random_model(config, options.device)  # noqa: E731
    if options.compile == TUNED:
        recommended_inductor_settings()  # for bfloat16 too, before its first product
    kind = hardware_kind(options.device)

    def kept(measured: list[Figures]) -> None:
        if options.json:
            figures = [asdict(row) for row in measured]
            options.json.write_text(json.dumps({"kind": kind, "rows": figures}, indent=1))

    measured = run(rows, make, ids_BT.to(options.device), options, text_ids, kept)
    shape_name = f"{options.shape} ({options.blocks or 'all'} blocks)"
    name = options.model.name if options.model else shape_name
    how = f"compiled ({options.compile})" if options.compile else "not compiled"
    how += f", attention {options.attention}"
    print(f"\n{name}, batch {options.batch}, prompt {options.prompt}, {how}; {kind}\n")
    print(table(measured))
    if tokenizer is not None:
        print(f"\n{text_table(measured, tokenizer.decode)}")


if __name__ == "__main__":
    main()
