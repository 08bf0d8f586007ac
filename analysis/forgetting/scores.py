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

from analysis.forgetting.artefact import clear_partials, replace
from analysis.runs import load_run

FOLDER = "scores"
ORDER = "validation.json"  # running indices of the validation rows, in the order of a pair's numbers
NOBODY = -1  # in `val`: a validation sample that was deleted


def shard_paths(run: Path) -> list[Path]:
    """The shards in the order written."""
    return sorted((run / FOLDER).glob("shard-*.pt"))


def forget_scores(run: Path, samples: pa.Table, ids: Set[str]) -> None:
    """Remove the rows of these samples. Pairs with a deleted validation sample stay, as those of nobody: they
    are part of what other samples' values are sums of.

    Args:
        samples: The run's `samples.parquet`, with these samples still in it.

    Raises:
        AnalysisError: A shard is missing, damaged, or cannot be written.
    """
    paths = shard_paths(run)
    if not paths:
        return
    gone = torch.tensor(indices_of(samples, ids), dtype=torch.int64)
    for path, shard in zip(paths, load_run(run).scores(), strict=True):
        keep = ~torch.isin(shard["sample"], gone)
        nobody = torch.zeros(0, dtype=torch.bool)
        if "val" in shard:
            order = torch.tensor(validation_order(run, samples, gone), dtype=torch.int64)
            nobody = torch.isin(shard["val"], torch.isin(order, gone).nonzero().flatten())
            shard["val"] = shard["val"].masked_fill(nobody, NOBODY)
        if not keep.all() or nobody.any():
            replace(path, partial(_save, {name: column[keep] for name, column in shard.items()}))
        clear_partials(path)


def unnamed_rows(run: Path, samples: pa.Table) -> Iterator[str]:
    """Clauses on shards with rows or pairs of samples that `samples.parquet` does not have."""
    paths = shard_paths(run)
    if not paths:
        return
    known = torch.from_numpy(samples["index"].to_numpy().copy())
    for path, shard in zip(paths, load_run(run).scores(), strict=True):
        unknown = ~torch.isin(shard["sample"], known)
        if unknown.any():
            yield f"has rows in {path.name} of sample {int(shard['sample'][unknown][0])}, which has no name"
        if "val" in shard:
            order = torch.tensor(validation_order(run, samples, None), dtype=torch.int64)
            val = shard["val"][shard["val"] != NOBODY]
            if len(val) and (int(val.max()) >= len(order) or not torch.isin(order[val], known).all()):
                yield f"has pairs in {path.name} with a validation sample that has no name"


def indices_of(samples: pa.Table, ids: Set[str]) -> list[int]:
    """Running indices of these samples."""
    wanted = pc.is_in(samples["sample_id"], pa.array(sorted(ids), pa.string()))
    return samples.filter(wanted)["index"].to_pylist()


def validation_order(run: Path, samples: pa.Table, gone: torch.Tensor | None) -> list[int]:
    """Running indices of the validation rows, by their number in a pair.

    Numbers count the domains' turns, so they cannot be told once a sample is missing: before the first one
    goes, the order is written beside the shards. It has no ids.

    Args:
        gone: Indices that are about to go; None where nothing is to be written.
    """
    path = run / FOLDER / ORDER
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))["index"]
    rows = samples.filter(pc.equal(samples["split"], "val"))
    turns: list[tuple[int, int, int]] = []
    seen: dict[str, int] = {}
    for place, (index, domain) in enumerate(
        zip(rows["index"].to_pylist(), rows["domain"].to_pylist(), strict=True)
    ):
        seen[domain] = seen.get(domain, -1) + 1
        turns.append((seen[domain], place, index))
    order = [index for _, _, index in sorted(turns)]
    if gone is not None and set(order) & set(gone.tolist()):
        text = json.dumps({"index": order}) + "\n"
        replace(path, lambda beside: beside.write_text(text, encoding="utf-8"))
    return order


def _save(shard: dict[str, torch.Tensor], path: Path) -> None:
    with path.open("wb") as file:  # torch's own error for a full disk is no OSError
        torch.save(shard, file)
