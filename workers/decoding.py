"""Steps and prompts of a model as servers run them: on a GPU, replays of CUDA graphs.

Up to 16 tokens a call are a step of so many sequences, out of a static cache; more are a prompt.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Literal

import torch
from quantkernels.graphs import capturing
from torch import Tensor

from workers.attending import stepping

_MOST_SEQUENCES = 16  # of a step
_BEGUN = 4  # tokens of each sequence that a cache begins with
_FEW_WORDS = 4096  # that one choice is quick for
_PIECES = range(256, 1025)  # words of a piece


def is_step(tokens: int) -> bool:
    return tokens <= _MOST_SEQUENCES


def call(
    model: Any, tokens: int, cache_tokens: int, longest: int | None = None
) -> Callable[[], object]:
    """One call of a model with so many tokens.

    A step's cache has `cache_tokens` places for each sequence. A prompt of more tokens than
    `longest` comes as several of one length.
    """
    device = next(model.parameters()).device
    if not is_step(tokens):
        rows = sequences(tokens, longest or tokens)
        draw = torch.Generator(device).manual_seed(0)  # products of equal rows take less power
        words = model.config.get_text_config().vocab_size
        ids_BT = torch.randint(words, (rows, tokens // rows), generator=draw, device=device)
        return captured(lambda: model(ids_BT, use_cache=False, logits_to_keep=1).logits, device)
    decoder = Decoder(model, tokens, cache_tokens)
    ids_BT = torch.ones(tokens, _BEGUN, dtype=torch.long, device=device)
    decoder.capture(ids_BT)
    left = 0  # of the cache

    def step() -> None:
        nonlocal left
        if not left:
            decoder.begin(ids_BT)
            left = cache_tokens - _BEGUN - 1
        decoder.step()
        left -= 1

    return step


def sequences(tokens: int, longest: int) -> int:
    """The fewest of one length that have so many tokens, none longer than that."""
    return next(n for n in range(-(-tokens // longest), tokens + 1) if tokens % n == 0)


class Decoder:
    """A token of each sequence a call, at shapes and addresses that stay as they are.

    ``mode`` is torch.compile's; None computes eagerly. Steps have our attention where it was found
    to be the model's (attending.py), unless ``attention`` is "torch".
    """

    def __init__(
        self,
        model: Any,
        batch: int,
        length: int,
        mode: str | None = None,
        attention: Literal["ours", "torch"] = "ours",
    ) -> None:
        from transformers import StaticCache

        device = next(model.parameters()).device
        self._model = model
        self._cache = StaticCache(config=model.config, max_cache_len=length)
        self.ids_B1 = torch.zeros(batch, 1, dtype=torch.long, device=device)
        self.logits_BV = torch.zeros(batch, model.config.vocab_size, device=device)
        tried = attention == "ours" and length > _BEGUN
        self._stepping = stepping(model, self._tried) if tried else nullcontext
        self._next = torch.compile(self._chosen, mode=mode) if mode else self._chosen
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
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
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

    def _tried(self) -> Tensor:
        """A step's logits after a few tokens that differ, so that their order shows."""
        batch, words = self.logits_BV.shape
        ids_T = torch.arange(_BEGUN, device=self.ids_B1.device) % words
        self._cache.reset()
        self._logits(ids_T.repeat(batch, 1))
        return self._logits(self.ids_B1)

    def _chosen(self, ids_B1: Tensor) -> tuple[Tensor, Tensor]:
        logits_BV = self._logits(ids_B1)
        return logits_BV, likeliest(logits_BV)

    def _computed(self) -> None:
        with self._stepping():
            logits_BV, next_B1 = self._next(self.ids_B1)
        self._put(logits_BV, next_B1)

    def _take(self, logits_BV: Tensor) -> None:
        self._put(logits_BV, likeliest(logits_BV))

    def _put(self, logits_BV: Tensor, next_B1: Tensor) -> None:
        self.logits_BV.copy_(logits_BV)
        self.ids_B1.copy_(next_B1)


def likeliest(logits_BV: Tensor) -> Tensor:
    """argmax(-1, keepdim=True), in two stages: torch has one program for each row of a GPU's.

    First of each piece of the vocabulary, then of the pieces. Of the same values the first is
    taken, and a NaN before all, by both stages as by one.
    """
    words = logits_BV.shape[-1]
    if words < _FEW_WORDS:
        return logits_BV.argmax(-1, keepdim=True)
    width = next((width for width in _PIECES if words % width == 0), None)
    if width is None:
        width = _PIECES[0]
        logits_BV = torch.nn.functional.pad(logits_BV, (0, -words % width), value=-torch.inf)
    best_BP, at_BP = logits_BV.reshape(len(logits_BV), -1, width).max(-1)
    piece_B1 = best_BP.argmax(-1, keepdim=True)
    return piece_B1 * width + at_BP.gather(-1, piece_B1)


def captured(run: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """A CUDA graph's replay, as servers run a model: its kernels' time, and none of Python's."""
    if device.type != "cuda":
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
