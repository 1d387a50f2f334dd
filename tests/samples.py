"""Models by their shapes alone, and the specs and plans over them: no file is read."""

import json
from typing import Any

from jobs.spec import JobSpec
from orchestrator.planning import make_plan, plan_layers
from workers.architecture import Architecture, Attention, BlockInfo, LinearInfo
from workers.plan import Norm, Plan

HIDDEN = 2048
INNER = 5632


def architecture(
    blocks: int = 3,
    hidden: int = HIDDEN,
    inner: int = INNER,
    *,
    tied: bool = False,
    kind: str = "Linear",
) -> Architecture:
    """A llama by its linears: q/k/v read one input, gate/up another."""

    def linear(name: str, rows: int, width: int) -> LinearInfo:
        return LinearInfo(name, rows, width, kind)

    def block(index: int) -> BlockInfo:
        attention, mlp = f"model.layers.{index}.self_attn", f"model.layers.{index}.mlp"
        return BlockInfo(
            (
                (
                    linear(f"{attention}.q_proj", hidden, hidden),
                    linear(f"{attention}.k_proj", hidden // 4, hidden),
                    linear(f"{attention}.v_proj", hidden // 4, hidden),
                ),
                (linear(f"{attention}.o_proj", hidden, hidden),),
                (
                    linear(f"{mlp}.gate_proj", inner, hidden),
                    linear(f"{mlp}.up_proj", inner, hidden),
                ),
                (linear(f"{mlp}.down_proj", hidden, inner),),
            ),
            (norm(index, "input_layernorm"), None, norm(index, "post_attention_layernorm"), None),
        )

    def norm(index: int, name: str) -> Norm:
        return Norm(f"model.layers.{index}.{name}", "scale", bias=False)

    return Architecture(
        model_type="llama",
        blocks=tuple(block(index) for index in range(blocks)),
        head=None if tied else LinearInfo("lm_head", 32000, hidden, "Linear"),
        embedding="model.embed_tokens",
        vocabulary=32000,
        hidden_size=hidden,
        attention=Attention(heads=32, kept_heads=32, width=hidden // 32, capped=False),
        max_length=4096,
    )


def job_spec(**sections: Any) -> JobSpec:
    """`job_spec(quantization={...})` replaces whole sections; None leaves one out."""
    job = {
        "name": "job",
        "model": {"path": "/models/m"},
        "quantization": {"scheme": "int4"},
        "compute_dtype": "float32",
        "calibration": {"text": "/texts/t", "sequences": 64, "length": 512},
        "output": {"store": "/store"},
        **sections,
    }
    return JobSpec.model_validate_json(
        json.dumps({key: value for key, value in job.items() if value is not None})
    )


def plan(blocks: int = 3, **sections: Any) -> Plan:
    spec = job_spec(**sections)
    planned, head, faults = plan_layers(spec, architecture(blocks))
    assert not faults
    return make_plan(spec, planned, head, {"device": "cpu"})
