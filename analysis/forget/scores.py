"""Score shards, which know samples by number: training samples by their running index, and in pairs the
validation samples by their place among the validation rows.
"""

import json
from collections.abc import Iterator, Set
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import torch

from analysis.forget.artefact import clear_partials, replace
from analysis.runs import load_run, read_shard
from analysis.samples import DELETED, VALIDATION_ORDER, validation_order

FOLDER = "scores"


def forget_scores(folder: Path, ids: Set[str]) -> None:
    """Remove the rows of these samples from a run's shards. Pairs with a deleted validation sample stay, as
    those of nobody: they are part of what other samples' values are sums of.

    Args:
        folder: The run's directory, with these samples still in its `samples.parquet`.

    Raises:
        AnalysisError: A shard is missing, damaged, or cannot be written.
    """
    run = load_run(folder)
    if not run.has_shards:
        return
    gone = torch.tensor(indices_of(run.samples, ids), dtype=torch.int64)
    for path in run.shards():
        shard = read_shard(path)
        keep = ~torch.isin(shard["sample"], gone)
        nobody = torch.zeros(0, dtype=torch.bool)
        if "val" in shard:
            order = validation_order(run)
            if set(order) & set(gone.tolist()):
                _keep_order(folder, order)
            numbers = torch.isin(torch.tensor(order, dtype=torch.int64), gone).nonzero().flatten()
            nobody = torch.isin(shard["val"], numbers)
            shard["val"] = shard["val"].masked_fill(nobody, DELETED)
        if not keep.all() or nobody.any():
            replace(path, partial(_save, {name: column[keep] for name, column in shard.items()}))
        clear_partials(path)


def unnamed_rows(folder: Path) -> Iterator[str]:
    """Clauses on shards with rows or pairs of samples that `samples.parquet` does not have."""
    run = load_run(folder)
    if not run.has_shards:
        return
    known = torch.from_numpy(run.samples["index"].to_numpy().copy())
    for path in run.shards():
        shard = read_shard(path)
        unknown = ~torch.isin(shard["sample"], known)
        if unknown.any():
            yield f"has rows in {path.name} of sample {int(shard['sample'][unknown][0])}, which has no name"
        if "val" in shard:
            order = torch.tensor(validation_order(run), dtype=torch.int64)
            val = shard["val"][shard["val"] != DELETED]
            if len(val) and (int(val.max()) >= len(order) or not torch.isin(order[val], known).all()):
                yield f"has pairs in {path.name} with a validation sample that has no name"


def indices_of(samples: pa.Table, ids: Set[str]) -> list[int]:
    """Running indices of these samples."""
    wanted = pc.is_in(samples["sample_id"], pa.array(sorted(ids), pa.string()))
    return samples.filter(wanted)["index"].to_pylist()


def _keep_order(run: Path, order: list[int]) -> None:
    """Write the numbers of the validation rows beside the shards; it has no ids."""
    text = json.dumps({"index": order}) + "\n"
    replace(run / VALIDATION_ORDER, lambda beside: beside.write_text(text, encoding="utf-8"))


def _save(shard: dict[str, torch.Tensor], path: Path) -> None:
    with path.open("wb") as file:  # torch's own error for a full disk is no OSError
        torch.save(shard, file)
