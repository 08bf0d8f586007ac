"""Whether a store finds what is alike: near-duplicates, windows of the same document, samples of the same
domain.

`python -m benchmarks.retrieval STORE [--near 0.3]` takes every sample of a projection store as a query
against all others, by the cosine of projected gradients. Near-duplicates are known by their text alone:
windows that share at least `--near` of their five-token sequences (Jaccard). The store's `config.yaml` says
where the text is.
"""

import argparse
from collections import defaultdict
from collections.abc import Iterable
from itertools import combinations
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from omegaconf import OmegaConf

from benchmarks.common import report
from ghost import ProjectionStore
from runners.data import build_data
from runners.data.base import SampleSet

SHINGLE = 5
COMMON = 50  # a sequence that more windows have says nothing of any two of them
RANKS = (1, 5, 10)
QUERIES = 256


def shingles(samples: SampleSet, i: int) -> frozenset[tuple[int, ...]]:
    """The sequences of five tokens in sample i."""
    inputs, _, _ = samples[i]
    assert isinstance(inputs, dict)
    ids = inputs["input_ids"].tolist()
    return frozenset(zip(*(ids[start:] for start in range(SHINGLE)), strict=False))


def near_duplicates(samples: SampleSet, near: float) -> dict[int, set[int]]:
    """By position, the other samples that share at least `near` of the five-token sequences of both."""
    sets = [shingles(samples, i) for i in range(len(samples))]
    owners: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for i, own in enumerate(sets):
        for shingle in own:
            owners[shingle].append(i)
    pairs = {pair for those in owners.values() if len(those) <= COMMON for pair in combinations(those, 2)}
    found: dict[int, set[int]] = defaultdict(set)
    for i, j in pairs:
        if len(sets[i] & sets[j]) >= near * len(sets[i] | sets[j]):
            found[i].add(j)
            found[j].add(i)
    return found


def groups(names: Iterable[str]) -> dict[int, set[int]]:
    """By position, the others of the same name."""
    members: dict[str, set[int]] = defaultdict(set)
    for i, name in enumerate(names):
        members[name].add(i)
    return {i: those - {i} for those in members.values() for i in those if len(those) > 1}


def neighbours(store: ProjectionStore, k: int) -> NDArray[np.int64]:
    """The k nearest other samples of every sample, `[N, k]` sample ids."""
    ids, rows = store.sample_ids, store.matrix()
    found = []
    for start in range(0, len(ids), QUERIES):
        near, _ = store.search(np.asarray(rows[start : start + QUERIES], dtype=np.float32), k + 1)
        for own, line in zip(ids[start : start + QUERIES], np.asarray(near), strict=True):
            found.append([other for other in line if other != own][:k])
    return np.array(found)


def recall(found: NDArray[np.int64], wanted: dict[int, set[int]], k: int) -> float:
    """The share of the wanted that are among the first k, of at most k; a mean over the samples that want
    any.
    """
    shares = [len(wanted[i] & set(found[i, :k].tolist())) / min(k, len(wanted[i])) for i in wanted]
    return float(np.mean(shares))


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("store", type=Path)
    parser.add_argument("--near", type=float, default=0.3)
    args = parser.parse_args()
    store, cfg = ProjectionStore.open(args.store), OmegaConf.load(args.store / "config.yaml")
    samples = build_data(cfg.data).train
    if store.sample_ids.tolist() != list(range(len(samples))):
        parser.error(f"{args.store} does not hold all {len(samples)} training samples in order")
    found = neighbours(store, max(RANKS))
    truths = {
        f"near-duplicates (Jaccard ≥ {args.near:g})": near_duplicates(samples, args.near),
        "same document": groups(name.rpartition("#")[0] for name in samples.sample_ids),
        "same domain": groups(samples.domains),
    }
    truths |= {
        f"same domain: {domain}": {
            i: own for i, own in truths["same domain"].items() if samples.domains[i] == domain
        }
        for domain in sorted(set(samples.domains))
    }
    rows = []
    for name, wanted in truths.items():
        row: dict[str, object] = {"what": name, "queries": len(wanted)}
        for k in RANKS if wanted else ():
            # A random order has each of n others among the first k with probability k / n.
            chance = np.mean(
                [k * len(own) / (len(samples) - 1) / min(k, len(own)) for own in wanted.values()]
            )
            row[f"recall@{k}"], row[f"random@{k}"] = (
                round(recall(found, wanted, k), 3),
                round(float(chance), 3),
            )
        rows.append(row)
    rows = [row for row in rows if row["queries"]]
    report("retrieval", list(rows[0]), rows)


if __name__ == "__main__":
    main()
