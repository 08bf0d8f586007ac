"""Which sample is which in the real `Trainer`, whatever its data is, and the table of their values."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from torch.utils.data import IterableDataset

from analysis.select import command as select
from ghost.errors import BatchError
from ghost.values import values_by_sample
from tests.analysis.command_line import Command
from tests.ghost.integrations.hf_trainers import (
    ROWS,
    Row,
    assert_replayed,
    rows,
    scored_trainer,
    shards,
    stacked,
)
from tests.ghost.models import tiny_gpt2


def table_of(given: list[Row], **columns: list[int]) -> Dataset:
    """A Hugging Face data set with a text column, which no model and no collator takes."""
    tensors = {key: [row[key].tolist() for row in given] for key in given[0]}
    return Dataset.from_dict({"text": ["private"] * len(given), **tensors, **columns})


@pytest.mark.parametrize(
    "given",
    [
        {"dataloader_num_workers": 2},
        {"train_sampling_strategy": "group_by_length"},
        {"dataloader_drop_last": True, "gradient_accumulation_steps": 2},
    ],
    ids=str,
)
def test_a_hugging_face_data_set(tmp_path: Path, given: dict[str, Any]) -> None:
    train, val, by_hand = rows(ROWS), rows(3), tiny_gpt2()
    model = tiny_gpt2()
    model.load_state_dict(by_hand.state_dict())
    scored_trainer(tmp_path, model, table_of(train), table_of(val), num_train_epochs=1, **given).train()
    assert_replayed(by_hand, model, train, val, shards(tmp_path), max_norm=0.05)


def test_rows_may_bring_their_own_index(tmp_path: Path) -> None:
    train, val = rows(4), rows(2)
    own = table_of(train, sample_index=[7, 0, 100, 3])
    scored_trainer(tmp_path, tiny_gpt2(), own, val, num_train_epochs=1).train()
    assert sorted(shards(tmp_path)["sample"].tolist()) == [0, 3, 7, 100]


class Stream(IterableDataset[Row]):
    """Rows without numbers."""

    def __init__(self, given: list[Any]) -> None:
        self.given = given

    def __iter__(self) -> Iterator[Any]:
        return iter(self.given)


def test_a_stream_must_bring_indices(tmp_path: Path) -> None:
    train, val = rows(4), rows(2)
    numbered = Stream([{**row, "sample_index": 10 + i} for i, row in enumerate(train)])
    scored_trainer(tmp_path / "a", tiny_gpt2(), numbered, val, max_steps=2).train()
    assert shards(tmp_path / "a")["sample"].tolist() == [10, 11, 12, 13]
    for stream in (Stream(train), Stream([(row,) for row in train])):
        trainer = scored_trainer(tmp_path / "b", tiny_gpt2(), stream, val, max_steps=2)
        with pytest.raises(BatchError, match="sample_index"):
            trainer.train()


def test_values_go_to_a_table_that_the_analysis_reads(tmp_path: Path, in_process: Command) -> None:
    train, val = rows(ROWS), rows(3)
    sets = {"first": val[:1], "others": stacked(val[1:])}
    ghost = {"resolution": "family", "preconditioner": "auto"}
    trainer = scored_trainer(
        tmp_path, tiny_gpt2(), train, sets, ghost=ghost, optim="adamw_torch", gradient_accumulation_steps=2
    )
    trainer.train()
    assert trainer.manager is not None
    assert trainer.manager.scores.shape == (2, 2)  # an epoch's last step has one micro-batch
    path = tmp_path / "scores" / "values.parquet"
    table = pq.read_table(path).to_pydict()
    assert table["sample_id"] == [str(i) for i in range(ROWS)]
    assert table["times_seen"] == [2] * ROWS
    expected = values_by_sample(tmp_path / "scores" / "scores")
    assert table["value"] == [value for value, _ in expected.values()]
    assert in_process(select.main, f"values={path}", "method=quantile", "quantile=0.5", "out=keep.txt") == 0
    assert len((tmp_path / "keep.txt").read_text().split()) == ROWS // 2
