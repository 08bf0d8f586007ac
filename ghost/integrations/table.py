"""The values of a finished run, as a table."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from ghost.atomic import written_beside
from ghost.values import values_by_sample

VALUES_FILE = "values.parquet"

_SCHEMA = pa.schema(
    [("sample_id", pa.string()), ("domain", pa.string()), ("value", pa.float64()), ("times_seen", pa.int64())]
)


def write_values(result_dir: Path) -> Path:
    """Write `values.parquet` from the score shards in `result_dir`/scores: one row for each sample that was
    scored, `sample_id` its running index as text, `domain` empty, `value` (NaN where a score is not finite),
    `times_seen`. It is laid out as a run's of the experiment runner, for `analysis.select`.

    Returns:
        The table's path.
    """
    values = values_by_sample(result_dir / "scores")
    columns = {
        "sample_id": [str(index) for index in values],
        "domain": [""] * len(values),
        "value": [value for value, _ in values.values()],
        "times_seen": [seen for _, seen in values.values()],
    }
    result_dir.mkdir(parents=True, exist_ok=True)  # it is not there where nothing was scored
    path = result_dir / VALUES_FILE
    with written_beside(path) as partial:
        pq.write_table(pa.table(columns, schema=_SCHEMA), partial)
    return path
