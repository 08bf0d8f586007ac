"""Deletes samples from a store of projected gradients, by their ids.

python -m analysis.forget outputs/DAY/TIME/projections --id mail/17#0 --compact
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from analysis.errors import AnalysisError
from ghost import GhostError, ProjectionStore
from ghost.atomic import written_beside

log = logging.getLogger(__name__)

SAMPLES = "samples.parquet"
MISTAKE = 2


def forget(folder: Path, ids: Sequence[str], indices: Sequence[int]) -> int:
    """Delete samples from the store and from its `samples.parquet`; returns how many.

    A command that was killed in between can be typed again: what is gone already is passed over.

    Args:
        folder: The store's folder.
        ids: As in the `sample_id` column of `samples.parquet`.
        indices: As in its `index` column.

    Raises:
        AnalysisError: A sample is not in the store's `samples.parquet`, or that cannot be read or written.
        StoreError: The store cannot be changed.
    """
    samples = read_samples(folder)
    for column, wanted in (("sample_id", ids), ("index", indices)):
        present = pc.is_in(
            pa.array(wanted, samples.schema.field(column).type), samples[column].combine_chunks()
        )
        if unknown := [value for value, found in zip(wanted, present.to_pylist(), strict=True) if not found]:
            raise AnalysisError(
                f"{folder / SAMPLES} has no sample of {column} {unknown[0]!r}, so nothing was deleted: give "
                "ids that it has."
            )
    gone = pc.or_(
        pc.is_in(samples["sample_id"], pa.array(ids, pa.string())),
        pc.is_in(samples["index"], pa.array(indices, pa.int64())),
    )
    numbers = samples.filter(gone)["index"].to_numpy()
    store = ProjectionStore.open(folder)
    store.delete(np.intersect1d(numbers, store.sample_ids))
    _write(samples.filter(pc.invert(gone)), folder / SAMPLES)
    return len(numbers)


def compact(folder: Path) -> None:
    """Rewrite the store without deleted samples, and remove what a killed writer of `samples.parquet` has
    left.

    Raises:
        StoreError: The store cannot be changed.
    """
    ProjectionStore.open(folder).compact()
    for partial in folder.glob(f".{SAMPLES}.*.partial"):
        partial.unlink(missing_ok=True)


def read_samples(folder: Path) -> pa.Table:
    """The store's `samples.parquet`.

    Raises:
        AnalysisError: It is missing or damaged.
    """
    path = folder / SAMPLES
    if not path.is_file():
        raise AnalysisError(f"{path} is missing: give the folder of a store that engine=gradprojlora wrote.")
    try:
        return pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise AnalysisError(f"{path} is damaged: {str(error).splitlines()[0]}") from error


def running_index(text: str) -> int:
    """A number as the `index` column holds it, for argparse."""
    number = int(text)
    if not 0 <= number < 2**63:
        raise argparse.ArgumentTypeError(f"{text} is no running index, which are 0 or more and of 63 bits")
    return number


def main(arguments: Sequence[str]) -> int:
    """Runs the command and returns the exit code: 0, or 2 after a mistake."""
    parser = argparse.ArgumentParser(prog="python -m analysis.forget", description=__doc__)
    parser.add_argument("store", type=Path, help="folder of the store")
    parser.add_argument("--id", action="append", default=[], help="sample_id of a sample; may be repeated")
    parser.add_argument(
        "--index", action="append", default=[], type=running_index, help="the same by its running index"
    )
    parser.add_argument("--compact", action="store_true", help="rewrite the files, so that no byte remains")
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    if not (given.id or given.index or given.compact):
        parser.error("name samples by --id or --index, or rewrite the files by --compact")
    try:
        if given.id or given.index:
            number = forget(given.store, given.id, given.index)
            log.info("Samples deleted from %s: %d.", given.store, number)
        if given.compact:
            compact(given.store)
            log.info("%s is rewritten: nothing of deleted samples is left in it.", given.store)
        elif given.id or given.index:
            log.info("Their rows are in its files until --compact rewrites these.")
    except (AnalysisError, GhostError) as error:
        log.error("%s", error)
        return MISTAKE
    return 0


def _write(table: pa.Table, path: Path) -> None:
    try:
        with written_beside(path) as partial:
            pq.write_table(table, partial)
    except OSError as error:
        raise AnalysisError(
            f"{path} cannot be written ({error.strerror or error}) and still names deleted samples: make "
            "room, or make it writable, and type the same command again."
        ) from error


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
