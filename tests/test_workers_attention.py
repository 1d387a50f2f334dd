"""Attention alone is let off torch's list of what is not deterministic."""

import torch
from torch.nn.functional import scaled_dot_product_attention

from workers.attention import NoObjection, attention_on


class Watched(torch.overrides.TorchFunctionMode):
    """Under the mode that is tried: how strict torch is at each call that it lets through."""

    def __init__(self) -> None:
        super().__init__()
        self.strict: dict[str, bool] = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
        self.strict[func.__name__] = not warn_only
        return func(*args, **(kwargs or {}))


def test_all_but_attention_stays_strict() -> None:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        x = torch.randn(1, 2, 5, 8)
        plain = scaled_dot_product_attention(x, x, x, is_causal=True)
        with Watched() as watched, NoObjection():
            found = scaled_dot_product_attention(x, x, x, is_causal=True)
            torch.add(found, 1)
        assert watched.strict == {"scaled_dot_product_attention": False, "add": True}
        assert torch.equal(found, plain)
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(before)


def test_nothing_changes_off_cuda() -> None:
    with Watched() as watched, attention_on(torch.device("cpu")):
        x = torch.randn(1, 1, 3, 4)
        scaled_dot_product_attention(x, x, x)
    assert watched.strict["scaled_dot_product_attention"] == (
        not torch.is_deterministic_algorithms_warn_only_enabled()
    )
