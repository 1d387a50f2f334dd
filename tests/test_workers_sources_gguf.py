"""A small GGUF file: read a tensor at a time, it equals what transformers loads from it."""

import json
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from orchestrator.checks import check
from orchestrator.driver import run_job
from orchestrator.executors import InProcessExecutor
from orchestrator.fetch import fetch
from orchestrator.loop import Observer
from quantcore.errors import SourceError
from tests.conftest import BLOCKS, HIDDEN, INNER, VOCABULARY
from workers.sources import open_source
from workers.store import open_store

HEADS, KV_HEADS = 4, 2
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
OUTSIDE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


@pytest.fixture(scope="module")
def gguf_file(model_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small Llama as llama.cpp would store it: q and k permuted, linears in Q8_0."""
    from transformers import AutoTokenizer

    folder = model_folder("llama")
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(BLOCKS)
    writer.add_context_length(256)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(VOCABULARY)
    vocabulary = AutoTokenizer.from_pretrained(folder).get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.NORMAL] * len(tokens))
    writer.add_token_merges(_merges(folder))
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    for name, tensor in load_file(folder / "model.safetensors").items():
        _add(writer, name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _merges(folder: Path) -> list[str]:
    merges = json.loads((folder / "tokenizer.json").read_text())["model"]["merges"]
    return [" ".join(pair) for pair in merges]


def _add(writer: gguf.GGUFWriter, name: str, values: np.ndarray) -> None:
    if name in OUTSIDE:
        writer.add_tensor(OUTSIDE[name], values)
        return
    _, _, block, rest = name.split(".", 3)
    module = rest.removesuffix(".weight")
    stored = f"blk.{block}.{NAMES[module]}.weight"
    if module.endswith(("q_proj", "k_proj")):
        heads = HEADS if module.endswith("q_proj") else KV_HEADS
        half = values.shape[0] // heads // 2
        values = values.reshape(heads, 2, half, -1).swapaxes(1, 2).reshape(values.shape)
    if values.ndim == 1:
        writer.add_tensor(stored, values)
        return
    kind = gguf.GGMLQuantizationType.Q8_0
    writer.add_tensor(stored, gguf.quantize(values, kind), raw_dtype=kind)


def test_tensors_equal_those_that_transformers_loads(gguf_file: Path) -> None:
    from transformers import AutoModelForCausalLM

    source = open_source(gguf_file)
    whole = AutoModelForCausalLM.from_pretrained(
        gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32
    ).state_dict()
    assert set(source.tensors) == set(whole)
    for name, tensor in source.read(source.tensors):
        assert tensor.shape == source.tensors[name].shape
        assert torch.equal(tensor, whole[name]), name


def test_dequantized_values_are_near_the_model_it_was_made_from(
    gguf_file: Path, model_folder: Callable[..., Path]
) -> None:
    before = load_file(model_folder("llama") / "model.safetensors")
    source = open_source(gguf_file)
    for name, tensor in source.read(source.tensors):
        assert (tensor - before[name]).abs().max() <= before[name].abs().max() / 127, name


def test_what_a_gguf_file_is_made_of_hangs_on_its_metadata_and_not_on_its_weights(
    gguf_file: Path, tmp_path: Path
) -> None:
    made_of = open_source(gguf_file).made_of()
    data = bytearray(gguf_file.read_bytes())
    other = tmp_path / "other.gguf"
    for at, same in ((len(data) - 1, True), (data.index(b"whale"), False)):
        data[at] ^= 1  # of a value, then of a token
        other.write_bytes(data)
        assert (open_source(other).made_of() == made_of) is same


def test_a_gguf_file_becomes_an_artifact(
    gguf_file: Path,
    model_folder: Callable[..., Path],
    job_file: Callable[..., Path],
    tmp_path: Path,
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    job = job_file(
        model={"path": str(gguf_file), "dtype": "bfloat16"},
        quantization={"scheme": "int8", "method": "rtn"},
        calibration=None,
    )
    prepared = check(job)
    result = run_job(prepared, lambda plan: InProcessExecutor(plan, ["cpu"]), Observer())
    fetch(open_store(result.store), tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    assert model.generate(torch.arange(2, 10)[None], max_new_tokens=3).shape[1] > 8
    before, after = (
        AutoTokenizer.from_pretrained(f) for f in (model_folder("llama"), tmp_path / "out")
    )
    assert after("the whale").input_ids == before("the whale").input_ids


def test_a_damaged_file_is_a_source_error(gguf_file: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(gguf_file.read_bytes()[:500])
    with pytest.raises(SourceError, match=r"damaged\.gguf does not read as a GGUF model"):
        open_source(damaged)
