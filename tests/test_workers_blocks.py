"""Models as blocks: the block-by-block forward is the whole model's, to the bit."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from quantcore.errors import SourceError
from tests.conftest import ARCHITECTURES, save_model
from workers.architecture import inspect
from workers.blocks import BlockModel, run_block
from workers.sources import open_source

Folder = Callable[..., Path]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_block_by_block_equals_the_whole_model(model_folder: Folder, name: str) -> None:
    from transformers import AutoModelForCausalLM

    folder = model_folder(name)
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids_BL = torch.randint(2, 300, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected_BLV = whole(ids_BL).logits
    model = BlockModel(open_source(folder), torch.float32)
    inputs = model.embed(ids_BL)
    hidden_BLH = inputs.hidden_BLH
    for index, call in enumerate(inputs.calls):
        hidden_BLH = run_block(model.block(index), call, hidden_BLH)
    assert torch.equal(model.logits(ids_BL, hidden_BLH), expected_BLV)


def test_gemma2_masks_differ_by_layer_type(model_folder: Folder) -> None:
    model = BlockModel(open_source(model_folder("gemma2")), torch.float32)
    calls = model.embed(torch.arange(2, 42)[None]).calls
    sliding, full, sliding_too = (call.kwargs["attention_mask"] for call in calls)
    assert torch.equal(sliding, sliding_too)
    # some versions of transformers leave a plain causal mask to the attention itself
    assert full is None or not torch.equal(sliding, full)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_linears_that_share_an_input_are_grouped(model_folder: Folder, name: str) -> None:
    architecture = inspect(open_source(model_folder(name)))
    leaves = [[info.name.split(".")[-1] for info in g] for g in architecture.blocks[1].groups]
    assert leaves == [
        ["q_proj", "k_proj", "v_proj"],
        ["o_proj"],
        ["gate_proj", "up_proj"],
        ["down_proj"],
    ]
    assert (architecture.head is None) == (name in {"llama-tied", "gemma2"})


def test_sharded_and_single_file_checkpoints_read_alike(model_folder: Folder) -> None:
    single = open_source(model_folder("llama"))
    sharded = open_source(model_folder("llama", max_shard_size="100KB"))
    assert len(list(sharded.path.glob("*.safetensors"))) > 2
    assert single.tensors == sharded.tensors
    others = dict(sharded.read(sharded.tensors))
    for name, tensor in single.read(single.tensors):
        assert torch.equal(tensor, others[name])


@pytest.mark.parametrize(
    ("name", "word"), [("mixtral", "mixture of experts"), ("llama", "quantized already")]
)
def test_what_cannot_be_handled_is_refused_by_name(tmp_path: Path, name: str, word: str) -> None:
    import json

    folder = save_model(name, tmp_path)
    if name == "llama":
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
        (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(SourceError, match=word):
        inspect(open_source(folder))


def test_shared_keys_and_values_are_refused_by_name(model_folder: Folder) -> None:
    source = open_source(model_folder("llama"))
    source.config.num_kv_shared_layers = 2
    with pytest.raises(SourceError, match="shares keys and values"):
        inspect(source)


def test_a_checkpoint_that_lacks_a_tensor_is_refused_by_its_name(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = save_model("llama", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    missing = "model.layers.1.mlp.up_proj.weight"
    del tensors[missing]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SourceError, match=missing):
        inspect(open_source(folder))
