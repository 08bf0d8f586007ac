"""Values by column: what the columns are called, and what they sum to."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from ghost.scores import Column, ScoreLog
from runners.choices import TaskName
from runners.data.base import DataBundle, Item, SampleSet
from runners.values import write_columns, write_values


class Named(SampleSet):
    """Samples that have ids and domains, and nothing else."""

    def __init__(self, ids: list[str], domains: list[str], offset: int) -> None:
        self.sample_ids, self.domains, self.offset = ids, domains, offset

    def __getitem__(self, i: int) -> Item:
        return torch.zeros(1), torch.zeros((), dtype=torch.int64), i

    def preview(self, i: int, width: int = 80) -> str:
        return self.sample_ids[i]


def bundle() -> DataBundle:
    train = Named([f"t{i}" for i in range(4)], ["a", "b", "a", "b"], 0)
    val = Named(["v0", "v1", "v2"], ["1", "1", "2"], 4)
    return DataBundle(
        train=train, val=val, task=TaskName.table_classes, vocab_size=None, input_shape=(1,), num_classes=2,
        fingerprint="0", description="four samples",
    )  # fmt: skip


def log_steps(out: Path, columns: list[Column], val: list[Tensor] | None) -> None:
    log = ScoreLog(out / "scores")
    for step in range(2):
        score = torch.arange(3.0 * len(columns)).reshape(3, -1) + step
        log.append(
            step, torch.tensor([0, 1, 3]), score, torch.full((len(columns),), 0.5), torch.ones(()), columns,
            None if val is None else val[step],
        )  # fmt: skip
    log.flush()


@pytest.mark.parametrize(
    ("columns", "names"),
    [
        ([Column("total", 0, "1"), Column("total", 0, "2")], ["1", "2"]),
        ([Column("total", 0, "domain"), Column("total", 0, "x")], ["set domain", "x"]),
        ([Column("mlp", 0, ""), Column("attn", 0, "")], ["mlp", "attn"]),
        ([Column("other", 0, "")], ["other"]),
        ([Column("mlp", 0, "1"), Column("mlp", 0, "2")], ["mlp | 1", "mlp | 2"]),
    ],
    ids=["sets named as numbers", "a set named as a column", "parts", "one part", "parts of sets"],
)
def test_columns_have_the_names_of_what_they_are(
    tmp_path: Path, columns: list[Column], names: list[str]
) -> None:
    log_steps(tmp_path, columns, None)
    write_values(tmp_path, bundle().train)
    write_columns(tmp_path, bundle(), pairwise=False)
    found = pq.read_table(tmp_path / "values_by_column.parquet").to_pydict()
    assert list(found) == ["sample_id", "domain", *names]
    assert found["domain"] == ["a", "b", "b"]
    total = [sum(row) for row in zip(*(found[name] for name in names), strict=True)]
    assert total == pytest.approx(pq.read_table(tmp_path / "values.parquet")["value"].to_pylist())


def test_pairs_are_named_by_validation_sample(tmp_path: Path) -> None:
    """Rows take turns: v0 and v2 stand for their domains first, then v1."""
    columns = [Column("total", 0, "pair 0"), Column("total", 0, "pair 1")]
    log_steps(tmp_path, columns, [torch.tensor([0, 1]), torch.tensor([2, 0])])
    write_columns(tmp_path, bundle(), pairwise=True)
    found = pq.read_table(tmp_path / "values_by_column.parquet").to_pydict()
    assert set(found) == {"sample_id", "domain", "v0", "v1", "v2"}
    assert found["v0"] == pytest.approx([0.5 * (0 + 2), 0.5 * (2 + 4), 0.5 * (4 + 6)])
    assert found["v2"] == pytest.approx([0.5 * 1, 0.5 * 3, 0.5 * 5])
    assert found["v1"] == pytest.approx([0.5 * 1, 0.5 * 3, 0.5 * 5])
