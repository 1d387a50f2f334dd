"""Merging is writing three small things: the index, the config and, last, the manifest."""

import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from orchestrator.checks import Prepared
from quantcore.formats import FORMATS
from workers.layout import INDEX, KEPT, MANIFEST, MODEL, dump, hash_file
from workers.store import Store

FileFacts = dict[str, dict[str, Any]]  # by name: sha256 and size


def write_model(
    store: Store, prepared: Prepared, records: Iterable[Mapping[str, Any]]
) -> FileFacts:
    """Complete model/ around the published blocks; every file of it with its hash and size."""
    files: FileFacts = {}
    weight_map: dict[str, str] = {}
    total = 0
    for record in records:
        files[record["file"]] = {"sha256": record["sha256"], "size": record["size"]}
        for tensor, num_bytes in record["tensors"].items():
            weight_map[tensor] = record["file"].removeprefix(f"{MODEL}/")
            total += num_bytes
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    with tempfile.TemporaryDirectory(prefix="quantfleet-") as scratch:
        folder = Path(scratch)
        names = prepared.source.write_companions(folder)
        (folder / "config.json").write_bytes(dump(_config(prepared)))
        (folder / Path(INDEX).name).write_bytes(dump(index))
        for name in [*names, "config.json", Path(INDEX).name]:
            sha256, size = hash_file(folder / name)
            store.put_file(f"{MODEL}/{name}", folder / name)
            files[f"{MODEL}/{name}"] = {"sha256": sha256, "size": size}
    return files


def commit(store: Store, job: str, files: FileFacts) -> bool:
    """Write the manifest: from now on there is an artifact. False if there was one already."""
    manifest = {"version": 1, "job": job, "files": files}
    written = store.put_if_absent(MANIFEST, dump(manifest))
    if written:
        for name in store.list(f"{MODEL}/"):
            if name not in files:  # a block file that lost its race, or of an earlier attempt
                store.delete(name)
        for name in store.list(f"{KEPT}/"):
            store.delete(name)
        for folder in (MODEL, KEPT):
            store.sweep(folder)  # of workers that were killed while they wrote
    return written


def _config(prepared: Prepared) -> dict[str, Any]:
    plan = prepared.plan
    schemes = {layer.name: layer.scheme for layer in plan.layers() if layer.scheme}
    skipped = [layer.name for layer in plan.layers() if not layer.scheme]
    if plan.head is None:
        # also where the head shares the embedding's weight: engines still build the module
        head = prepared.architecture.head
        skipped.append(head.name if head else "lm_head")
    config = prepared.source.config_json()
    config["quantization_config"] = FORMATS[plan.format].config(schemes, skipped)
    return config
