"""Which modules of a block are given a kernel's forward: those that compute just that."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.conftest import ARCHITECTURES, _configs
from workers.fusing import fuse


class Norm(nn.Module):
    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps))


class Centred(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(-1, keepdim=True))


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 24), nn.Linear(8, 24), nn.Linear(24, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.nn.functional.silu(self.b(x)) * self.a(x))


class Clamped(Gated):
    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.nn.functional.silu(self.b(x)).clamp(max=7) * self.a(x))


class Gelu(Gated):
    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.nn.functional.gelu(self.b(x)) * self.a(x))


@pytest.mark.parametrize("module", [Norm(16), Norm(16, eps=1e-3), Gated()])
def test_what_computes_the_same_is_fused_and_goes_on_doing_so(module: nn.Module) -> None:
    x = torch.randn(2, 3, 16 if isinstance(module, Norm) else 8)
    before = module(x)
    assert fuse(nn.ModuleDict({"it": module})) == ["it"]
    assert torch.allclose(module(x), before, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("module", [Centred(16), Clamped(), Gelu()], ids=lambda m: type(m).__name__)
def test_what_computes_something_else_keeps_its_forward(module: nn.Module) -> None:
    assert fuse(nn.ModuleDict({"it": module})) == []


def apply_rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Of neighbours, as GPT-J pairs them, and not of halves."""

    def turned(x: Tensor) -> Tensor:
        pairs = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
        return x * cos[:, None] + pairs * sin[:, None]

    return turned(q), turned(k)


class Neighbours(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.own = nn.Linear(4, 4)

    def forward(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return apply_rotary_pos_emb(q, k, cos, sin)


def test_a_rotation_of_other_pairs_stays() -> None:
    assert fuse(nn.ModuleDict({"it": Neighbours()})) == []


def test_tables_that_cover_a_part_of_a_head_are_left_to_the_model() -> None:
    """Only the call shows them: what was fused falls back to the model's own function."""
    from transformers.models.llama import modeling_llama

    attention = modeling_llama.LlamaAttention(_configs()["llama"](), 0)
    other = modeling_llama.LlamaAttention(_configs()["llama"](), 1)
    assert fuse(attention) == [""]
    assert "forward" not in vars(other)
    embed = attention.forward.__globals__["apply_rotary_pos_emb"]
    x, tables = torch.randn(1, 2, 5, 8), torch.randn(1, 5, 8)
    assert torch.equal(
        embed(x, x, tables, tables, unsqueeze_dim=1)[0],
        modeling_llama.apply_rotary_pos_emb(x, x, tables, tables)[0],
    )
    turned = x.transpose(1, 2)
    assert embed(turned, turned, tables, tables, unsqueeze_dim=2)[0].shape == turned.shape


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_blocks_of_every_family_give_what_they_gave(name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(_configs()[name](), dtype=torch.float32).eval()
    ids = torch.randint(0, 300, (2, 24))
    with torch.no_grad():
        before = model(ids).logits
        fused = [found for block in model.model.layers for found in fuse(block)]
        assert len(fused) >= 3 * len(model.model.layers)
        assert fused.count("self_attn") == len(model.model.layers)
        assert torch.allclose(model(ids).logits, before, rtol=1e-4, atol=1e-5)
