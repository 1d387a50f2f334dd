"""Steps and prompts of a model as servers run them: replays of CUDA graphs."""

from collections.abc import Callable

import torch
from quantkernels.graphs import capturing
from torch import Tensor, nn


class Decoder:
    """A token of each sequence a call, at shapes and addresses that stay as they are.

    ``mode`` is torch.compile's; None computes eagerly.
    """

    def __init__(self, model: nn.Module, batch: int, length: int, mode: str | None = None) -> None:
        from transformers import StaticCache

        device = next(model.parameters()).device
        self._model = model
        self._cache = StaticCache(config=model.config, max_cache_len=length)
        self.ids_B1 = torch.zeros(batch, 1, dtype=torch.long, device=device)
        self.logits_BV = torch.zeros(batch, model.config.vocab_size, device=device)
        self._next = torch.compile(self._logits, mode=mode) if mode else self._logits
        self._step: Callable[[], None] = self._computed

    def begin(self, ids_BT: Tensor) -> None:
        self._cache.reset()  # in place
        self._take(self._logits(ids_BT))

    def step(self) -> Tensor:
        self._step()
        return self.ids_B1

    def capture(self, ids_BT: Tensor) -> None:
        """From here on steps are replays of one graph. A CPU has none, and computes on."""
        self.begin(ids_BT)
        if self.ids_B1.device.type != "cuda":
            return self._computed()  # what is compiled is compiled now
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self._computed()
        torch.cuda.current_stream().wait_stream(side)
        with capturing() as graph:
            self._computed()
        self._step = graph.replay
        return None

    def _logits(self, ids_BT: Tensor) -> Tensor:
        """Positions are the cache's own, counted on its device."""
        output = self._model(ids_BT, past_key_values=self._cache, logits_to_keep=1)
        logits_BV: Tensor = output.logits[:, -1]
        return logits_BV

    def _computed(self) -> None:
        self._take(self._next(self.ids_B1))

    def _take(self, logits_BV: Tensor) -> None:
        self.logits_BV.copy_(logits_BV)
        self.ids_B1.copy_(logits_BV.argmax(-1, keepdim=True))


def captured(run: Callable[[], object]) -> Callable[[], object]:
    """A CUDA graph's replay, as servers run a model: its kernels' time, and none of Python's."""
    if not torch.cuda.is_available():
        return run
    for _ in range(2):
        run()
    torch.cuda.synchronize()
    with capturing() as graph:
        kept = run()

    def replay() -> object:
        graph.replay()
        return run, kept  # the graph reads and writes what these hold

    return replay
