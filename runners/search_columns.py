"""A scored run's values by column, and what the name of a query means among them."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from analysis.errors import AnalysisError
from analysis.runs import Run
from conf.errors import ConfigError, first_line
from conf.hydra_errors import suggestion
from runners.values import COLUMNS_FILE

WHOLE = "value"  # the query for a sample's whole value
BETWEEN = " | "  # between part and validation set in a column's name
LISTED = 20  # columns in an error


class Columns:
    """Read one at a time: columns of single validation samples may be thousands.

    Attributes:
        samples: `index`, `sample_id` and `domain` of the samples that were scored, `index` ascending.
        names: The columns; none where the run's scores were not resolved.

    Args:
        shown: The run as the user named it, for errors.
    """

    def __init__(self, run: Run, shown: str) -> None:
        self._run, self._shown = run, shown
        self._path = run.directory / COLUMNS_FILE
        self.names: list[str] = []
        ids = run.values["sample_id"]
        if self._path.is_file():
            self.names = [
                name for name in self._file().schema_arrow.names if name not in ("sample_id", "domain")
            ]
            ids = self._read("sample_id")
        known = pc.is_in(ids, run.samples["sample_id"].combine_chunks())
        if not pc.all(known).as_py():
            unknown = ids.filter(pc.invert(known))[0]
            raise AnalysisError(f"{run.directory}/samples.parquet lacks {str(unknown)!r}, which has a value.")
        scored = run.samples.filter(pc.is_in(run.samples["sample_id"], ids.combine_chunks()))
        self.samples: pa.Table = scored.sort_by("index")

    def values(self, query: str) -> NDArray[np.float64]:
        """Of each of `samples`, `[n]`: of one column, or of a part or a set the sum of its columns; NaN where
        there is none.

        Raises:
            ConfigError: The run has nothing of this name.
        """
        if query == WHOLE and query not in self.names:
            return self._in_order(self._run.values["sample_id"], self._run.values["value"].to_numpy())
        total = sum(self._read(name).to_numpy() for name in self._meant(query))
        return self._in_order(self._read("sample_id"), np.asarray(total))

    def domain(self, query: str) -> str:
        """The query's own domain: a validation sample's, or that of which it is the set; else empty."""
        own = self._run.samples.filter(pc.equal(self._run.samples["sample_id"], query))
        if len(own):
            return str(own["domain"][0])
        return query if query in pc.unique(self._run.samples["domain"]).to_pylist() else ""

    def advice(self) -> str:
        """What to type where no column is named."""
        if self.names:
            return f"run={self._shown} has values by column: type query.column=NAME ({self._listed()})"
        return (
            f"run={self._shown} has one value a sample: type query.column={WHOLE}, or train "
            "with engine.val_sets=domain, engine.resolution=family or engine.pairwise=true for values by "
            "set, part or validation sample"
        )

    def _meant(self, query: str) -> list[str]:
        """The columns that are summed for a query."""
        if query in self.names:
            return [query]
        split = {name: name.partition(BETWEEN) for name in self.names}
        of_part = [name for name, (part, between, _) in split.items() if between and part == query]
        of_set = [name for name, (_, between, val) in split.items() if between and val == query]
        if of_part and of_set:
            raise ConfigError(
                f"query.column={query} is both a part and a validation set of run={self._shown}: type one "
                f"column, such as '{of_part[0]}'"
            )
        if of_part or of_set:
            return of_part or of_set
        ends = {end for part, between, val in split.values() if between for end in (part, val)}
        hint = suggestion(query, [*self.names, *sorted(ends), WHOLE])
        raise ConfigError(f"query.column={query} is no column of run={self._shown}{hint} ({self._listed()})")

    def _listed(self) -> str:
        more = len(self.names) - LISTED
        return ", ".join(
            ["columns: " + ", ".join(self.names[:LISTED])] + [f"{more} more"] * (more > 0) + [WHOLE]
        )

    def _in_order(self, ids: pa.ChunkedArray, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Values of these samples in the order of `samples`."""
        place = pc.index_in(self.samples["sample_id"], ids.combine_chunks())
        found = pc.take(pa.array(values), place.combine_chunks())
        return found.fill_null(float("nan")).to_numpy()

    def _read(self, name: str) -> pa.ChunkedArray:
        try:
            # Parquet takes "a.b" for a field of "a" and reads both.
            return self._file().read(columns=[name])[name]
        except (pa.ArrowException, OSError) as error:
            raise AnalysisError(f"{self._path} is damaged: {first_line(error)}") from error

    def _file(self) -> pq.ParquetFile:
        try:
            return pq.ParquetFile(self._path)
        except (pa.ArrowException, OSError) as error:
            raise AnalysisError(f"{self._path} is damaged: {first_line(error)}") from error
