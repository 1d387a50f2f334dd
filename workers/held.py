"""The calibration sequences that one worker holds: chunks of micro-batches of hidden states."""

import hashlib
import tempfile
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from quantcore.errors import StoreError
from workers.blocks import BlockModel, Inputs
from workers.layout import KEPT, kept_name
from workers.plan import Plan
from workers.shelf import Shelf
from workers.store import Store
from workers.tasks import HeldChunk


@dataclass(slots=True)
class _Chunk:
    block: int  # whose input the hidden states are
    batches: list[Inputs]


class Held:
    def __init__(self, plan: Plan, model: BlockModel) -> None:
        self._plan = plan
        self._model = model
        self._shelf = Shelf(model.device, plan.states_on)
        self._chunks: dict[int, _Chunk] = {}

    def block_of(self, chunk: int) -> int:
        """The block whose input a chunk is."""
        return self._chunks[chunk].block

    def at(self, chunk: int, block: int, then: int | None = None) -> Iterator[Inputs]:
        """A chunk's micro-batches on the device; they must be the inputs of `block`.

        With the last of them the first of chunk `then` is on its way.
        """
        held = self._chunks[chunk]
        assert held.block == block, f"chunk {chunk} is at block {held.block}, not at {block}"
        waiting = [inputs.hidden_BLH for inputs in held.batches]
        following = [
            *waiting[1:],
            None if then is None else self._chunks[then].batches[0].hidden_BLH,
        ]
        for inputs, kept_BLH, later_BLH in zip(held.batches, waiting, following, strict=True):
            yield replace(inputs, hidden_BLH=self._shelf.get(kept_BLH, later_BLH))

    def each(self, chunks: Iterable[int], block: int) -> Iterator[tuple[int, Iterator[Inputs]]]:
        """One chunk after the other, as `at` has it."""
        numbers = list(chunks)
        for chunk, then in zip(numbers, [*numbers[1:], None], strict=True):
            yield chunk, self.at(chunk, block, then)

    def advance(self, chunk: int, hidden: Iterable[Tensor]) -> None:
        """A chunk's micro-batches are now these, the inputs of the next block."""
        held = self._chunks[chunk]
        shelved = [self._shelf.put(hidden_BLH) for hidden_BLH in hidden]
        for inputs, hidden_BLH in zip(held.batches, shelved, strict=True):
            inputs.hidden_BLH = hidden_BLH
        held.block += 1

    def spill(self) -> str | None:
        """Make room: everything goes one place down (shelf.py). Its name; None if there is none."""
        self._shelf.settle()
        if not self._shelf.lower():
            return None
        for chunk in self._chunks.values():
            for inputs in chunk.batches:
                inputs.hidden_BLH = self._shelf.put(inputs.hidden_BLH)
        self._shelf.settle()
        return self._shelf.place

    def embed(self, chunks: Iterable[int]) -> None:
        """Make chunks from the texts, as the first block's inputs."""
        for chunk in chunks:
            batches = [self._model.embed(ids_BL) for ids_BL in self._ids(chunk)]
            self._chunks[chunk] = _Chunk(0, [self._shelved(inputs) for inputs in batches])
        self._model.release_outside()

    def hand(self, chunks: Collection[int]) -> tuple[HeldChunk, ...]:
        """Give chunks away."""
        self._shelf.settle()
        packed = tuple(_packed(self._chunks[chunk]) for chunk in chunks)
        self.drop(chunks)
        return packed

    def take(self, chunks: Iterable[int], given: Iterable[HeldChunk]) -> None:
        """Hold what others gave away. How blocks are called hangs on the token ids' shape alone."""
        for chunk, packed in zip(chunks, given, strict=True):
            batches = []
            for ids_BL, data in zip(self._ids(chunk), packed.hidden, strict=True):
                calls, real_T = self._model.calls(ids_BL), self._model.real(ids_BL)
                hidden = data.to(self._model.device).view(self._plan.torch_dtype)
                hidden_BLH = hidden.reshape(*ids_BL.shape, -1)
                batches.append(self._shelved(Inputs(hidden_BLH, calls, real_T)))
            self._chunks[chunk] = _Chunk(packed.block, batches)
        self._model.release_outside()

    def keep(self, store: Store, block: int, chunks: Iterable[int]) -> None:
        self._shelf.settle()
        for chunk in chunks:
            held = self._chunks[chunk]
            assert held.block == block
            batches = [data.cpu() for data in _packed(held).hidden]
            tensors = {str(number): data for number, data in enumerate(batches)}
            with tempfile.TemporaryDirectory(prefix="quantfleet-") as scratch:
                file = Path(scratch) / "chunk.safetensors"
                save_file(tensors, file, metadata={"sha256": _digest(batches)})
                store.put_file(kept_name(block, chunk), file)

    def load(self, store: Store, block: int, chunks: Iterable[int]) -> None:
        """Take chunks from where they were kept. Raises StoreError if they are not as kept."""
        for chunk in chunks:
            name = kept_name(block, chunk)
            with tempfile.TemporaryDirectory(prefix="quantfleet-") as scratch:
                file = Path(scratch) / "chunk.safetensors"
                store.get_file(name, file)
                try:
                    with safe_open(file, framework="pt") as kept:
                        count = len(kept.keys())
                        batches = tuple(kept.get_tensor(str(number)) for number in range(count))
                        digest = (kept.metadata() or {}).get("sha256")
                except SafetensorError:
                    batches, digest = (), None
            if digest != _digest(batches):
                raise StoreError(f"{store.url}: {name} is not what was kept: delete {KEPT}/ there")
            self.take([chunk], [HeldChunk(block, batches)])

    def drop(self, chunks: Iterable[int]) -> None:
        for chunk in chunks:
            self._chunks.pop(chunk, None)

    def clear(self) -> None:
        self._shelf.settle()
        self._chunks.clear()

    def _shelved(self, inputs: Inputs) -> Inputs:
        return replace(inputs, hidden_BLH=self._shelf.put(inputs.hidden_BLH))

    def _ids(self, chunk: int) -> list[Tensor]:
        """The token ids of a chunk's micro-batches."""
        assert self._plan.tokens is not None
        size = self._plan.contract.micro_batch
        numbers = self._plan.micro_batches_of(chunk, chunk + 1)
        rows = [self._plan.tokens[number * size : (number + 1) * size] for number in numbers]
        return [torch.tensor(ids_BL, dtype=torch.int64) for ids_BL in rows]


def pack(block: int, hidden: Iterable[Tensor]) -> HeldChunk:
    """Micro-batches of hidden states as bytes, where they are."""
    batches = (h_BLH.contiguous().flatten().view(torch.uint8) for h_BLH in hidden)
    return HeldChunk(block, tuple(batches))


def _digest(batches: Iterable[Tensor]) -> str:
    digest = hashlib.sha256()
    for data in batches:
        digest.update(data.numpy().data)
    return digest.hexdigest()


def _packed(chunk: _Chunk) -> HeldChunk:
    return pack(chunk.block, (inputs.hidden_BLH for inputs in chunk.batches))
