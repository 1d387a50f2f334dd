"""A decoder-only model as what comes before its blocks, the blocks, and what comes after.

Found by structure, not by name: the repeated module list of a transformers model. Nothing of a
model's forward is written again here. Its own forward is run with every block replaced by a
recorder that notes what the block is called with (rotary tables, masks, position ids) and hands
its input on; so one pass over the token ids gives the first block's input and every block's
keyword arguments, and one more with the last recorder returning given hidden states gives logits.

A sequence's token ids may end in PADDING. A token is embedded there all the same: attention looks
back alone, so it reaches none of the sequence's own. Statistics of inputs leave such places out.

Shape suffixes: B = sequences, L = tokens each, H = hidden width, T = tokens of all sequences.
"""

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from quantcore.errors import SourceError
from workers.attention import attention_on
from workers.plan import PADDING
from workers.skeleton import empty_model
from workers.sources import ModelSource


@dataclass(frozen=True, slots=True)
class Call:
    """How the model calls one block, besides the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(slots=True)
class Inputs:
    """One micro-batch on its way through the blocks."""

    hidden_BLH: Tensor
    calls: list[Call]  # one per block; micro-batches of one shape share them
    real_T: Tensor | None = None  # int64: which of the B * L places hold tokens; None: all do


class _AllRecordedError(Exception):
    pass


class _Recorder(nn.Module):
    """Stands in for a block: notes its call and passes the hidden states on."""

    def __init__(self, block: nn.Module, index: int, notes: "_Notes") -> None:
        super().__init__()
        object.__setattr__(self, "_block", block)  # not a submodule: its weights are not here
        self._index = index
        self._notes = notes

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "_block"), name)

    def forward(self, hidden_BLH: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self._notes.calls.append(Call(args, kwargs))
        if self._index == 0:
            self._notes.hidden_BLH = hidden_BLH
        if self._index == self._notes.last:
            if self._notes.result_BLH is None:
                raise _AllRecordedError
            return self._notes.result_BLH
        return hidden_BLH


@dataclass(slots=True)
class _Notes:
    last: int
    result_BLH: Tensor | None = None
    hidden_BLH: Tensor | None = None
    calls: list[Call] = field(default_factory=list)


class BlockModel:
    """One model, never whole in memory: blocks are made one at a time, on demand."""

    def __init__(
        self, source: ModelSource, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        self.source = source
        self.dtype = dtype
        self.device = torch.device(device)
        self.skeleton = empty_model(source.config, dtype)
        self._path, self._empty_blocks = find_blocks(self.skeleton)
        self._outside_loaded = False
        self._shared_calls: dict[tuple[int, ...], list[Call]] = {}

    def __len__(self) -> int:
        return len(self._empty_blocks)

    def prefix(self, index: int) -> str:
        """What the checkpoint names of a block's tensors begin with."""
        return f"{self._path}.{index}."

    def block_tensors(self, index: int) -> list[str]:
        return sorted(n for n in self.source.tensors if n.startswith(self.prefix(index)))

    def outside_tensors(self) -> list[str]:
        """Everything that belongs to no block: embeddings, final norm, output head, ..."""
        blocks = tuple(self.prefix(index) for index in range(len(self)))
        return sorted(name for name in self.source.tensors if not name.startswith(blocks))

    def empty_block(self, index: int) -> nn.Module:
        """A block whose weights are on the meta device, to be looked at."""
        return self._empty_blocks[index]

    def block(self, index: int, replace: dict[str, Tensor] | None = None) -> nn.Module:
        """A block with its weights, on the device in the compute dtype.

        `replace` holds weights by checkpoint name that stand in for the checkpoint's own.
        """
        replace = replace or {}
        prefix = self.prefix(index)
        names = [n for n in self.block_tensors(index) if n not in replace]
        tensors = {**dict(self.source.read(names)), **replace}
        block = copy.deepcopy(self._empty_blocks[index])
        self._load(block, {name.removeprefix(prefix): t for name, t in tensors.items()})
        return block.to(self.device)

    def embed(self, ids_BL: Tensor) -> Inputs:
        """The first block's input and every block's call, from the model's own forward."""
        self._load_outside()
        noted = self._record(ids_BL)
        noted.calls = self._shared_calls.setdefault(tuple(ids_BL.shape), noted.calls)
        noted.real_T = self.real(ids_BL)
        return noted

    def real(self, ids_BL: Tensor) -> Tensor | None:
        """Which places hold tokens, counted through all sequences, if not all do."""
        padded_T = (ids_BL == PADDING).flatten()
        if not padded_T.any():
            return None
        return (~padded_T).nonzero().flatten().to(self.device)

    def calls(self, ids_BL: Tensor) -> list[Call]:
        """How the blocks are called on token ids of this shape."""
        shape = tuple(ids_BL.shape)
        return (
            self._shared_calls[shape] if shape in self._shared_calls else self.embed(ids_BL).calls
        )

    def probe(self, ids_BL: Tensor, weights: dict[str, Tensor]) -> Inputs:
        """`embed` with weights that are given instead of read; the model is of no use after."""
        self.skeleton.load_state_dict(weights, strict=False, assign=True)
        return self._record(ids_BL)

    def logits(self, ids_BL: Tensor, hidden_BLH: Tensor) -> Tensor:
        """What the model makes of the last block's output (norm, head, soft-capping, ...)."""
        self._load_outside()
        return self._run(ids_BL, _Notes(last=len(self) - 1, result_BLH=hidden_BLH))

    def release_outside(self) -> None:
        """Free the weights outside the blocks; they are read again when next needed."""
        if self._outside_loaded:
            self.skeleton = empty_model(self.source.config, self.dtype)
            self._outside_loaded = False

    def _record(self, ids_BL: Tensor) -> Inputs:
        notes = _Notes(last=len(self) - 1)
        with contextlib.suppress(_AllRecordedError):
            self._run(ids_BL, notes)
        assert notes.hidden_BLH is not None
        assert len(notes.calls) == len(self)
        return Inputs(notes.hidden_BLH, notes.calls)

    @torch.no_grad()
    def _run(self, ids_BL: Tensor, notes: _Notes) -> Tensor:
        recorders = [_Recorder(b, i, notes) for i, b in enumerate(self._empty_blocks)]
        parent, name = self._path.rpartition(".")[::2]
        owner = self.skeleton.get_submodule(parent)
        setattr(owner, name, nn.ModuleList(recorders))
        embeddable_BL = ids_BL.clamp(min=0).to(self.device)
        output = self.skeleton(input_ids=embeddable_BL, use_cache=False)
        logits: Tensor = output.logits
        return logits

    def _load_outside(self) -> None:
        if self._outside_loaded:
            return
        owner = self.skeleton.get_submodule(self._path.rpartition(".")[0])
        setattr(owner, self._path.rpartition(".")[2], nn.ModuleList())
        self._load(self.skeleton, dict(self.source.read(self.outside_tensors())))
        self.skeleton.tie_weights()
        still_empty = [n for n, p in self.skeleton.named_parameters() if p.is_meta]
        if still_empty:
            raise SourceError(f"the checkpoint lacks '{still_empty[0]}', which the model needs")
        self.skeleton.to(self.device)
        self._outside_loaded = True

    def _load(self, module: nn.Module, tensors: dict[str, Tensor]) -> None:
        """Put tensors into a module by name; what the module does not know stays behind."""
        known = module.state_dict(keep_vars=True)
        usable = {}
        for name, tensor in tensors.items():
            if name in known:
                assert tensor.shape == known[name].shape, name  # held by architecture.inspect
                floating = tensor.is_floating_point()
                usable[name] = tensor.to(self.device, self.dtype if floating else None)
        module.load_state_dict(usable, strict=False, assign=True)
        module.requires_grad_(False)


def run_block(block: nn.Module, call: Call, hidden_BLH: Tensor) -> Tensor:
    """One block's forward; older models return a tuple whose first part is the hidden states."""
    with torch.no_grad(), attention_on(hidden_BLH.device):
        output = block(hidden_BLH, *call.args, **call.kwargs)
    result: Tensor = output[0] if isinstance(output, tuple) else output
    return result


def linears_of(block: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """The linears inside a block, by their name within it, in the model's own order."""
    for name, module in block.named_modules():
        if isinstance(module, nn.Linear):
            yield name, module


def find_blocks(model: nn.Module) -> tuple[str, list[nn.Module]]:
    """The path and the members of the model's list of decoder blocks. Raises SourceError."""
    lists = [
        (sum(p.numel() for p in module.parameters()), path, list(module))
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) > 0
    ]
    lists = [entry for entry in lists if len({type(block) for block in entry[2]}) == 1]
    if not lists:
        raise SourceError(f"{type(model).__name__} has no repeated list of decoder blocks")
    _, path, blocks = max(lists, key=lambda entry: entry[0])
    return path, blocks
