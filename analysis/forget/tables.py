"""Parquet tables with rows, and sometimes columns, of samples."""

from collections.abc import Set

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from analysis.errors import AnalysisError
from analysis.forget.artefact import NamingFile, replace

BETWEEN = " | "  # between part and validation sample in a column's name


class ParquetTable(NamingFile):
    """A table whose rows are of the samples in `sample_id`, `query` or `val`.

    A `val` that is the name of a domain is a validation set, not a sample.
    """

    def names(self) -> set[str]:
        return self._names_in(self.read())

    def read(self) -> pa.Table:
        """The table.

        Raises:
            AnalysisError: It is damaged.
        """
        try:
            return pq.ParquetFile(self.path).read()
        except (pa.ArrowException, OSError) as error:
            raise AnalysisError(f"{self.path} is damaged: {str(error).splitlines()[0]}") from error

    def _rewrite(self, ids: Set[str]) -> None:
        kept = _decoded(self._without(self.read(), ids))
        replace(self.path, lambda partial: pq.write_table(kept, partial))

    def _names_in(self, table: pa.Table) -> set[str]:
        return set[str]().union(*_row_ids(table).values())

    def _without(self, table: pa.Table, ids: Set[str]) -> pa.Table:
        for column, own in _row_ids(table).items():
            gone = pa.array(sorted(own & ids), pa.string())
            table = table.filter(pc.invert(pc.is_in(table[column].cast(pa.string()), gone)))
        return table


class ColumnTable(ParquetTable):
    """`values_by_column.parquet`, whose columns `ID` or `part | ID` may be of validation samples too."""

    def _names_in(self, table: pa.Table) -> set[str]:
        return super()._names_in(table) | set(_column_ids(table).values())

    def _without(self, table: pa.Table, ids: Set[str]) -> pa.Table:
        dropped = [column for column, own in _column_ids(table).items() if own in ids]
        return super()._without(table, ids).drop_columns(dropped)


def _row_ids(table: pa.Table) -> dict[str, set[str]]:
    """The ids in each column that has some."""
    columns = [name for name in ("sample_id", "query", "val") if name in table.column_names]
    texts = [name for name in columns if _is_text(table[name].type)]
    ids = {name: set(pc.unique(table[name]).to_pylist()) - {None} for name in texts}
    if "val" in ids:
        ids["val"] -= _domains(table)
    return ids


def _decoded(table: pa.Table) -> pa.Table:
    """The same with plain columns: the dictionary of an encoded one keeps values that no row has any more."""
    plain = [
        field.with_type(field.type.value_type) if pa.types.is_dictionary(field.type) else field
        for field in table.schema
    ]
    return table.cast(pa.schema(plain, table.schema.metadata))


def _is_text(kind: pa.DataType) -> bool:
    """Text, as any program writes it to Parquet."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return any(is_kind(kind) for is_kind in (pa.types.is_string, pa.types.is_large_string))


def _column_ids(table: pa.Table) -> dict[str, str]:
    """What each column of values may be of, if it is of a validation sample."""
    own = [name for name in table.column_names if name not in ("sample_id", "domain")]
    named = {name: name.partition(BETWEEN)[2] if BETWEEN in name else name for name in own}
    sets = _domains(table)
    return {column: name for column, name in named.items() if name not in sets}


def _domains(table: pa.Table) -> set[str]:
    return set(pc.unique(table["domain"]).to_pylist()) if "domain" in table.column_names else set()
