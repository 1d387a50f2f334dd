"""Linears of one input, joined: the same outputs, from fewer products."""

import pytest
import torch
from torch import Tensor, nn

from quantcore.errors import QuantizationError
from quantcore.joining import Joined, join_linears, joinable
from quantcore.quantize import quantize_
from quantcore.schemes import Scheme


class Attention(nn.Module):
    """Named as transformers names them, unlike in rows, and called last to first but for one."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q_proj = nn.Linear(64, 96, bias=bias)
        self.k_proj = nn.Linear(64, 32, bias=bias)
        self.v_proj = nn.Linear(64, 32, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        q, v, k = self.q_proj(x), self.v_proj(x), self.k_proj(x)
        return torch.cat([q, k, v], dim=-1)


def model_of(scheme: Scheme | None, layout: str, dtype: torch.dtype, bias: bool) -> nn.Module:
    model = nn.Sequential(Attention(bias), nn.Linear(160, 64), Attention(bias)).to(dtype)
    if scheme is not None:
        quantize_(model, scheme, layout=layout, inductor_settings=False)
    return model.eval()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("scheme", "layout"),
    [
        (None, "plain"),
        (Scheme(name="int4", group_size=32), "plain"),
        (Scheme(name="int4", group_size=32), "triton_tiled"),
        (Scheme(name="int4", group_size=32, zero_point="int"), "triton_tiled"),
        (Scheme(name="int8"), "triton_tiled"),
        (Scheme(name="int8_dynamic"), "plain"),
        (Scheme(name="float8_dynamic", per_tensor=True), "plain"),
    ],
    ids=str,
)
def test_joined_linears_give_what_each_gave(scheme: Scheme | None, layout: str, bias: bool) -> None:
    model = model_of(scheme, layout, torch.bfloat16, bias)
    x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    with torch.no_grad():
        wanted = model(x)
        assert joinable(model) == [
            tuple(f"{block}.{name}_proj" for name in "qkv") for block in (0, 2)
        ]
        assert join_linears(model) == ["0.q_proj", "2.q_proj"]
        assert joinable(model) == []
        assert (model(x) - wanted).norm() <= 1e-2 * wanted.norm()
        first = model[0]
        assert isinstance(first.q_proj, Joined) and first.q_proj._input is None
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        assert (compiled(x) - wanted).norm() <= 1e-2 * wanted.norm()


def test_linears_that_are_not_alike_stay_as_they_are() -> None:
    model = nn.Sequential(Attention(), Attention())
    quantize_(model[0].k_proj, "int8", inductor_settings=False)
    model[1].v_proj = nn.Linear(64, 32, bias=True)
    quantize_(model, "int4", lambda name, _: name == "0.q_proj", group_size=32)
    assert join_linears(model) == []


def test_another_input_is_refused() -> None:
    model = Attention()
    join_linears(model)
    x = torch.randn(1, 64)
    model.q_proj(x)
    with pytest.raises(QuantizationError, match="handed different inputs"):
        model.k_proj(x.clone())
