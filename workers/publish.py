"""Published blocks: one safetensors file each, named by its content, and one ledger record.

The file goes first and the record, put-if-absent, second: a record always points at a whole file,
and when two workers publish one block, the first record is the one that counts.
"""

import json
import math
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantcore.affine import Qparams, dequantize
from quantcore.errors import StoreError
from quantcore.formats import FORMATS, QuantizedLinear
from workers.clock import Clock
from workers.layout import block_file, hash_file, record_name
from workers.plan import GroupPlan, LayerPlan, Plan
from workers.rounding import fitted_stack
from workers.sources import ModelSource
from workers.store import Store
from workers.tasks import SolvedGroup

# tensors as stored, by name, and the report's line for each linear
Encoded = tuple[dict[str, Tensor], list[dict[str, Any]]]


def publish(
    store: Store, key: str, tensors: Mapping[str, Tensor], layers: list[dict[str, Any]]
) -> dict[str, Any]:
    """Write one file and its record; the record that stands, which may be another worker's."""
    with tempfile.TemporaryDirectory(prefix="quantfleet-") as scratch:
        local = Path(scratch) / "block.safetensors"
        contiguous = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
        try:
            save_file(contiguous, local, metadata={"format": "pt"})
        except (OSError, SafetensorError) as error:
            raise StoreError(f"cannot write {key} to the scratch {scratch}: {error}") from None
        sha256, size = hash_file(local)
        name = block_file(key, sha256)
        store.put_file(name, local)
    record = {
        "key": key,
        "file": name,
        "sha256": sha256,
        "size": size,
        "tensors": {name: tensor.nbytes for name, tensor in tensors.items()},
        "layers": layers,
    }
    if store.put_if_absent(record_name(key), json.dumps(record, indent=1).encode()):
        return record
    return read_record(store, key)


def read_record(store: Store, key: str) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads(store.get(record_name(key)))
    except ValueError:
        raise StoreError(f"{store.url}: {record_name(key)} is not JSON") from None
    return record


def published_tensors(store: Store, key: str) -> dict[str, Tensor]:
    """A published file's tensors. Raises StoreError if it is not what its record tells of."""
    record = read_record(store, key)
    with tempfile.TemporaryDirectory(prefix="quantfleet-") as scratch:
        local = Path(scratch) / "block.safetensors"
        store.get_file(record["file"], local)
        if hash_file(local) != (record["sha256"], record["size"]):
            raise StoreError(f"{store.url}: {record['file']} is not what was published")
        tensors: dict[str, Tensor] = load_file(local)
        return tensors


def decoded_weights(
    tensors: Mapping[str, Tensor], plan: Plan, block: int, device: torch.device
) -> dict[str, Tensor]:
    """The weights of a published block that are new, by checkpoint name, in the compute dtype.

    Quantized ones are dequantized; the norms that SmoothQuant changed are as they stand.
    """
    form = FORMATS[plan.format]
    norms = [name for norm in plan.blocks[block].smoothed() for name in norm.tensors()]
    # a norm that the search left as it is stands in a published file, not among what is new
    weights = {name: tensors[name].to(device) for name in norms if name in tensors}
    for layer in plan.blocks[block].quantized():
        assert layer.scheme is not None
        own = f"{layer.name}."
        parts = {n.removeprefix(own): t.to(device) for n, t in tensors.items() if n.startswith(own)}
        w_OI = form.decode(parts, layer.scheme, layer.in_features)
        weights[f"{own}weight"] = w_OI.to(plan.torch_dtype)
    return weights


def encode_solved(
    plan: Plan, groups: Iterable[GroupPlan], solved: Iterable[SolvedGroup], source: ModelSource
) -> Encoded:
    """A block's quantized tensors as stored, and the report's line for each linear."""
    tensors: dict[str, Tensor] = {}
    lines = []
    by_group: dict[int, list[SolvedGroup]] = {}
    for result in solved:
        by_group.setdefault(result.group, []).append(result)
    for index, group in enumerate(groups):
        for name, values_I in by_group[index][0].norm.items() if index in by_group else ():
            tensors[name] = values_I.to(source.tensors[name].dtype)
        for number, stack in enumerate(group.stacks()):
            tiles = sorted(
                (tile for part in by_group[index] for tile in part.tiles if tile.stack == number),
                key=lambda tile: tile.first_row,
            )
            codes_OI = torch.cat([tile.codes_OI for tile in tiles])
            scale_OG = torch.cat([tile.scale_OG for tile in tiles])
            zero_OG = torch.cat([tile.zero_OG for tile in tiles])
            error_O = torch.cat([tile.error_O for tile in tiles])
            output_O = torch.cat([tile.output_O for tile in tiles])
            first = 0
            for layer in stack:
                assert layer.scheme is not None
                rows = slice(first, first + layer.out_features)
                first += layer.out_features
                served = by_group[index][0]
                linear = QuantizedLinear(
                    codes_OI[rows],
                    Qparams(scale_OG[rows], zero_OG[rows]),
                    layer.scheme,
                    served.input_scale if layer.scheme.static else None,
                    served.input_factor_I,
                )
                tensors |= _encoded(plan, layer, linear, source)
                error, total = error_O[rows].sum().item(), output_O[rows].sum().item()
                relative = math.sqrt(error / total) if total > 0 else None
                facts = _facts_of(plan, layer, by_group[index][0].facts)
                lines.append(report_line(layer, facts, relative))
    return tensors, lines


def encode_rounded(
    plan: Plan,
    groups: Iterable[GroupPlan],
    source: ModelSource,
    device: torch.device,
    clock: Clock,
) -> Encoded:
    """Some linears by nearest codes, on grids from the extremes or as HQQ fits them."""
    tensors: dict[str, Tensor] = {}
    lines = []
    stacks = (stack for group in groups for stack in group.stacks())
    rows = (row for stack in stacks for row in fitted_stack(plan, stack, source, device))
    for layer, w_OI, linear in rows:
        with clock.spent("pack"):
            tensors |= _encoded(plan, layer, linear, source)
        delta_OI = w_OI.float() - dequantize(linear.codes_OI, linear.qparams, linear.scheme)
        norm = w_OI.float().norm().item()
        line = report_line(layer, {}, None)
        line["relative_weight_error"] = delta_OI.norm().item() / norm if norm else None
        lines.append(line)
    return tensors, lines


def _facts_of(plan: Plan, layer: LayerPlan, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Of a group's facts, those that are about a linear's own method."""
    others = set() if plan.rounding(layer) == "gptq" else {"damping", "fallback"}
    others |= set() if layer.method == "smoothquant" else {"alpha", "smoothed_in"}
    return {name: fact for name, fact in facts.items() if name not in others}


def report_line(
    layer: LayerPlan, facts: Mapping[str, Any], relative_output_error: float | None
) -> dict[str, Any]:
    assert layer.scheme is not None
    return {
        "layer": layer.name,
        "scheme": layer.scheme.label(),
        "method": layer.method,
        "alpha": facts.get("alpha"),
        "smoothed_in": facts.get("smoothed_in"),
        "damping": facts.get("damping"),
        "fallback": facts.get("fallback"),
        "tokens": facts.get("tokens", 0),
        "dropped_tokens": facts.get("dropped", 0),
        "silent_inputs": facts.get("silent_inputs", 0),
        "relative_output_error": relative_output_error,
    }


def _encoded(
    plan: Plan, layer: LayerPlan, linear: QuantizedLinear, source: ModelSource
) -> dict[str, Tensor]:
    scale_dtype = source.tensors[f"{layer.name}.weight"].dtype
    parts = FORMATS[plan.format].encode(linear, scale_dtype)
    return {f"{layer.name}.{suffix}": tensor for suffix, tensor in parts.items()}
