"""What the running indices of a run stand for: samples with an id and a domain, and validation rows."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from analysis.errors import AnalysisError
from analysis.runs import Run

VALIDATION_ORDER = "scores/validation.json"
DELETED = -1  # in a pairwise shard's `val`: a validation sample that was deleted


@dataclass(frozen=True)
class RunSamples:
    """The samples of a run, by their running index.

    Attributes:
        run: Whose they are.
        domains: `D` names, in alphabetical order.
        domain_of: `[size]` int32: the position of an index's domain among them; -1 where no sample has the
            index.
    """

    run: Run
    domains: list[str]
    domain_of: NDArray[np.int32]

    @classmethod
    def of(cls, run: Run) -> "RunSamples":
        """Raises `AnalysisError` where `samples.parquet` is missing or damaged, or an index is negative."""
        index = run.samples["index"].to_numpy()
        if index.size and index.min() < 0:
            raise AnalysisError(
                f"{run.directory}/samples.parquet is damaged: it has the index {index.min()}."
            )
        encoded = run.samples["domain"].combine_chunks().dictionary_encode()
        names = encoded.dictionary.to_numpy(zero_copy_only=False).astype(str)
        alphabetical = np.argsort(names)
        place = np.argsort(alphabetical).astype(np.int32)
        domain_of = np.full(int(index.max(initial=-1)) + 1, -1, dtype=np.int32)
        domain_of[index] = place[encoded.indices.to_numpy()]
        return cls(run, names[alphabetical].tolist(), domain_of)

    @property
    def size(self) -> int:
        """One more than the highest index."""
        return len(self.domain_of)

    def domains_of(self, sample: NDArray[np.int64]) -> NDArray[np.int32]:
        """The positions of the samples' domains, `[n]`.

        Raises:
            AnalysisError: There is no such sample.
        """
        if not sample.size:
            return np.zeros(0, dtype=np.int32)
        if sample.min() >= 0 and sample.max() < self.size:
            found = self.domain_of[sample]
            if found.min() >= 0:
                return found
        raise AnalysisError(
            f"{self.run.directory}/samples.parquet lacks a sample that the score shards name."
        )

    def ids(self, index: NDArray[np.int64]) -> pa.Array:
        """The ids of the samples with these running indices, all of which there are."""
        row_of = np.full(self.size, -1, dtype=np.int64)
        row_of[self.run.samples["index"].to_numpy()] = np.arange(self.run.samples.num_rows)
        return self.run.samples["sample_id"].combine_chunks().take(pa.array(row_of[index]))

    @cached_property
    def val_ids(self) -> list[str | None]:
        """Ids of the validation samples, in the order of the rows that pairwise shards name; None for one
        that was deleted.
        """
        ids = dict(
            zip(self.run.samples["index"].to_pylist(), self.run.samples["sample_id"].to_pylist(), strict=True)
        )
        return [ids.get(index) for index in validation_order(self.run)]


def validation_order(run: Run) -> list[int]:
    """Running indices of the validation rows, by their number in pairwise shards.

    Numbers count the domains' turns, so they cannot be told from what is left once a sample is deleted: the
    order from before stands beside the shards then, in `VALIDATION_ORDER`.
    """
    path = run.directory / VALIDATION_ORDER
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))["index"]
    val = run.samples.filter(pc.equal(run.splits, "val"))
    index = val["index"].to_pylist()
    return [index[i] for i in taking_turns(val["domain"].to_pylist())]


def taking_turns(domains: Sequence[str]) -> list[int]:
    """Positions in the order in which the domains take turns; a domain's own order stays."""
    seen: dict[str, int] = {}
    turns = []
    for position, domain in enumerate(domains):
        seen[domain] = seen.get(domain, -1) + 1
        turns.append((seen[domain], position))
    return [position for _, position in sorted(turns)]
