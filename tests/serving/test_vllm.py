"""vLLM loads the artifacts and computes what is stored in them.

    QUANTFLEET_VLLM_PYTHON=/path/to/its/python pytest -m vllm

vLLM pins versions of its own, so it runs in another environment. What it has no CPU kernel for is
not here: MEASUREMENTS.md has the list.
"""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from orchestrator.checks import check
from orchestrator.driver import run_job
from orchestrator.executors import InProcessExecutor
from orchestrator.fetch import fetch
from orchestrator.loop import Observer
from workers.loading import load
from workers.store import open_store

pytestmark = pytest.mark.vllm

PYTHON = "QUANTFLEET_VLLM_PYTHON"
PROMPT = torch.randint(2, 320, (96,), generator=torch.Generator().manual_seed(3)).tolist()
TOKENS = 12

INT4 = {"scheme": "int4", "group_size": 64}
# vLLM looks a fused linear (qkv_proj, gate_up_proj) up by the names of its parts: have both kinds
# of it skipped, under another group size or storage, and under the usual scheme.
MIXED = {
    **INT4,
    "overrides": [
        {"match": "*.layers.0.*", "skip": True},
        {"match": "*.layers.1.mlp.*", "scheme": "int8_dynamic"},
        {"match": "*.layers.2.self_attn.*", "group_size": 128},
    ],
}
# The same for gptq's rules
GPTQ_MIXED = {
    **INT4,
    "overrides": [
        {"match": "*.layers.0.*", "skip": True},
        {"match": "*.layers.1.self_attn.o_proj", "skip": True},
        {"match": "*.layers.2.self_attn.*", "group_size": 128},
        {"match": "*.layers.2.mlp.*", "group_size": "channel"},
    ],
}
FLOAT8 = {"scheme": "float8_dynamic", "method": "rtn"}
FLOAT8_MIXED = {**FLOAT8, "overrides": [{"match": "*.layers.1.mlp.*", **INT4}]}


@pytest.fixture(scope="module")
def vllm_python() -> str:
    python = os.environ.get(PYTHON)
    if not python:
        pytest.fail(f"set {PYTHON} to the Python of an environment with vLLM")
    return python


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, model_folder: Callable[..., Path]) -> Path:
    """A random Llama with heads as wide as vLLM's attention kernels want them."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("wide-llama")
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=1,
    )
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data = 0.08 * torch.randn_like(parameter)
    model.to(torch.bfloat16).save_pretrained(folder)  # vLLM's type: no rounding between them
    AutoTokenizer.from_pretrained(model_folder("llama")).save_pretrained(folder)
    return folder


def artifact(job: Path, out: Path) -> Path:
    prepared = check(job)
    result = run_job(prepared, lambda plan: InProcessExecutor(plan, ["cpu"]), Observer())
    fetch(open_store(result.store), out)
    return out


def serve(python: str, folder: Path) -> dict[str, Any]:
    request = json.dumps({"prompt": PROMPT, "tokens": TOKENS})
    script = Path(__file__).with_name("generate.py")
    run = subprocess.run(
        [python, str(script), str(folder), request],
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-6000:]
    answer: dict[str, Any] = json.loads(run.stdout)
    return answer


def logprobs(folder: Path, tokens: list[int]) -> Tensor:
    """Of every next token at every position, in float32: by transformers, or our own modules."""
    with torch.no_grad():
        logits: Tensor = load(folder, torch.float32)(torch.tensor([tokens])).logits[0]
    return logits.float().log_softmax(-1)


CT, V1, V2 = "compressed-tensors", "gptq", "gptq_v2"


@pytest.mark.parametrize(
    ("form", "quantization"),
    [
        pytest.param(CT, INT4, id="int4"),
        pytest.param(CT, {**INT4, "symmetric": False}, id="int4-asymmetric"),
        pytest.param(CT, {**INT4, "group_size": "channel"}, id="int4-channel"),
        pytest.param(CT, {"scheme": "int8_dynamic"}, id="int8_dynamic"),
        pytest.param(CT, {"scheme": "int8_dynamic", "method": "smoothquant"}, id="smoothquant"),
        pytest.param(CT, {"scheme": "int8_static", "method": "smoothquant"}, id="int8_static"),
        pytest.param(CT, {"scheme": "int8_dynamic_int4", "group_size": 32}, id="8da4w"),
        pytest.param(CT, FLOAT8, id="float8_dynamic"),
        pytest.param(CT, MIXED, id="mixed"),
        pytest.param(CT, FLOAT8_MIXED, id="float8-mixed"),
        pytest.param(V1, INT4, id="gptq-int4"),
        pytest.param(V1, {**INT4, "group_size": "channel"}, id="gptq-int4-channel"),
        pytest.param(V1, GPTQ_MIXED, id="gptq-mixed"),
        pytest.param(V2, INT4, id="gptq_v2-int4"),
    ],
)
def test_vllm_computes_what_transformers_computes(
    vllm_python: str,
    source: Path,
    job_file: Callable[..., Path],
    tmp_path: Path,
    form: str,
    quantization: dict[str, Any],
) -> None:
    output = {"store": str(tmp_path / "store"), "format": form}
    job = job_file(model={"path": str(source)}, quantization=quantization, output=output)
    folder = artifact(job, tmp_path / "out")
    served = serve(vllm_python, folder)
    tokens = served["tokens"]
    assert len(tokens) == TOKENS

    # Logprobs here spread by 1.3. Rounding activations goes another way after each last bit:
    # between bfloat16 and float32, both in transformers, int8_dynamic differs by 0.06 and
    # float8_dynamic, with its three bits of a mantissa, by 0.16.
    looser = 2 if quantization["scheme"].startswith("float8") else 1
    ours = logprobs(folder, PROMPT + tokens)
    chosen = ours[len(PROMPT) - 1 : -1]
    regret = chosen.max(-1).values - chosen[range(TOKENS), tokens]
    assert regret.max() < 0.3 * looser  # greedy for both, but for near ties
    prompt = range(len(PROMPT) - 1), PROMPT[1:]
    apart = (torch.tensor(served["prompt_logprobs"]) - ours[prompt]).abs().mean()
    assert apart < 0.15 * looser
    if quantization["scheme"] == "int4":  # the stored weights, not just some like them
        original = logprobs(source, PROMPT)
        assert apart < (original[prompt] - ours[prompt]).abs().mean() / 4
