"""The value tables that a scored run leaves behind."""

import logging
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from analysis.samples import taking_turns
from ghost.atomic import written_beside
from ghost.values import accumulate_columns, samples_without_value, values_by_sample
from runners.data.base import DataBundle, SampleSet

log = logging.getLogger(__name__)

_SHOWN = 8  # samples in a log line

VALUES_FILE = "values.parquet"
COLUMNS_FILE = "values_by_column.parquet"

VALUES_SCHEMA = pa.schema(
    [("sample_id", pa.string()), ("domain", pa.string()), ("value", pa.float64()), ("times_seen", pa.int64())]
)


def write_values(out: Path, train: SampleSet) -> None:
    """One row for each training sample that was scored, atomically written to `values.parquet`.

    A sample with a score that is not finite has no value: NaN, and a line in the log; `times_seen` counts its
    other rows.
    """
    values = values_by_sample(out / "scores")
    if lost := [index for index, (value, _) in values.items() if math.isnan(value)]:
        shown = [train.sample_ids[i] for i in lost[:_SHOWN]]
        log.warning("%d samples have no value, since a score is not finite: %s.", len(lost), ", ".join(shown))
    columns = [*_samples(train, list(values)), *zip(*values.values(), strict=True)]
    _write(pa.table(columns, schema=VALUES_SCHEMA), out / VALUES_FILE)


def write_columns(out: Path, data: DataBundle, pairwise: bool) -> None:
    """Write `values_by_column.parquet`: one row for each training sample that was scored, one column for each
    part of the model, validation set or validation sample; a row's columns sum to its value.

    Args:
        pairwise: Whether columns are of validation samples, whose numbers become ids.
    """
    found = accumulate_columns(out / "scores")
    lost = samples_without_value(out / "scores")
    indices = sorted({i for values in found.values() for i in values.sample.tolist()} | lost)
    place = {index: row for row, index in enumerate(indices)}
    ids, domains = _samples(data.train, indices)
    columns: dict[str, object] = {"sample_id": ids, "domain": domains}
    val_ids = [
        data.val.sample_ids[i] for i in taking_turns(data.val.domains)
    ]  # in the validation rows' order
    for (part, val), values in found.items():
        column = np.zeros(len(indices))
        column[[place[i] for i in values.sample.tolist()]] = values.value.numpy()
        column[[place[i] for i in lost]] = math.nan
        columns[_label(part, val_ids[int(val)] if pairwise else val)] = column
    _write(pa.table(columns), out / COLUMNS_FILE)


def _label(part: str, val: str) -> str:
    """`layer`, `set` or `layer | set`; a set may not pass for a column of the table's own."""
    if part == "total" and val:
        return f"set {val}" if val in ("sample_id", "domain") else val
    return f"{part} | {val}" if val else part


def _samples(samples: SampleSet, indices: list[int]) -> tuple[list[str], list[str]]:
    """Ids and domains."""
    return [samples.sample_ids[i] for i in indices], [samples.domains[i] for i in indices]


def _write(table: pa.Table, path: Path) -> None:
    with written_beside(path) as partial:
        pq.write_table(table, partial)
