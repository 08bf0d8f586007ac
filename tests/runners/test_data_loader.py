from itertools import islice

import pyarrow.parquet as pq
import pytest
import torch

from conf.errors import ConfigError
from runners.choices import TaskName
from runners.data.base import DataBundle, Item, SampleSet, token_rows
from runners.data.loader import eval_batches, shared_eval_batches, train_batches, val_batch, write_samples
from runners.world import World


class Counting(SampleSet):
    """Row i is `length(i)` tokens, all of them 100 + i, so that a batch's content says which sample it is."""

    layout = token_rows(6)

    def __init__(self, size: int, offset: int = 0, short: frozenset[int] = frozenset()) -> None:
        self.sample_ids = [f"row-{100 + i}" for i in range(size)]
        self.domains = ["even" if i % 2 == 0 else "odd" for i in range(size)]
        self.offset = offset
        self.short = short

    def __getitem__(self, i: int) -> Item:
        ids = torch.full((3 if i in self.short else 6,), 100 + i)
        return {"input_ids": ids}, ids.clone(), self.offset + i

    def preview(self, i: int, width: int = 80) -> str:
        return self.sample_ids[i]


def indices(samples, steps, **settings):
    arguments = {"batch_size": 4, "seed": 0, "shuffle": True, "num_workers": 0} | settings
    return [batch.index.tolist() for batch in islice(train_batches(samples, **arguments), steps)]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("shuffle", [False, True])
def test_an_index_stands_beside_the_content_of_its_sample(num_workers, shuffle):
    samples = Counting(11, offset=50)
    for batch in islice(train_batches(samples, 4, 3, shuffle, num_workers), 9):
        rows = batch.index - samples.offset
        assert [samples.sample_ids[i] for i in rows.tolist()] == [
            f"row-{token}" for token in batch.inputs["input_ids"][:, 0].tolist()
        ]
        for row, i in enumerate(rows.tolist()):
            torch.testing.assert_close(batch.inputs["input_ids"][row], samples[i][0]["input_ids"])


@pytest.mark.parametrize("shuffle", [False, True])
def test_every_sample_comes_once_in_each_epoch(shuffle):
    stream = [i for batch in indices(Counting(11), 11, shuffle=shuffle) for i in batch]
    assert len(stream) == 4 * 11  # four epochs, batches across their borders
    epochs = [stream[start : start + 11] for start in range(0, 44, 11)]
    assert all(sorted(epoch) == list(range(11)) for epoch in epochs)
    assert (len({tuple(epoch) for epoch in epochs}) == 4) == shuffle


def test_the_stream_depends_on_the_seed_alone():
    samples = Counting(11)
    first = indices(samples, 8)
    torch.manual_seed(99)
    assert indices(samples, 8) == first
    assert indices(samples, 8, num_workers=2) == first
    assert indices(samples, 8, seed=1) != first


def test_starting_a_stream_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    indices(Counting(11), 3)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("start", [0, 1, 2, 3, 7, 11, 30])
def test_a_stream_started_late_goes_on_as_the_whole_one(start):
    samples = Counting(11)
    assert indices(samples, 6, start_step=start) == indices(samples, start + 6)[start:]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_deal_out_the_one_stream(world_size, shuffle, num_workers):
    samples, steps = Counting(11), 6
    ranks = [
        indices(samples, steps, shuffle=shuffle, num_workers=num_workers, world=World(rank, world_size))
        for rank in range(world_size)
    ]
    dealt = [batch for step in zip(*ranks, strict=True) for batch in step]
    assert dealt == indices(samples, steps * world_size, shuffle=shuffle)


def test_a_process_started_late_goes_on_as_the_whole_stream():
    samples, world = Counting(11), World(1, 3)
    assert indices(samples, 4, start_step=5, world=world) == indices(samples, 9, world=world)[5:]


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 8])
def test_processes_share_an_evaluation_and_take_as_many_batches_each(world_size):
    samples = Counting(11)
    ranks = [list(shared_eval_batches(samples, 3, World(rank, world_size))) for rank in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1
    counted = [batch.index.tolist() for turn in zip(*ranks, strict=True) for batch, counts in turn if counts]
    assert counted == [batch.index.tolist() for batch in eval_batches(samples, 3)]


def test_a_batch_larger_than_the_set_is_refused():
    with pytest.raises(ConfigError, match=r"trainer.batch_size=12 exceeds the 11"):
        train_batches(Counting(11), 12, 0, True, 0)
    assert sorted(indices(Counting(11), 1, batch_size=11)[0]) == list(range(11))


def test_full_rows_have_no_attention_mask():
    batch = val_batch(Counting(3))
    assert set(batch.inputs) == {"input_ids"}
    assert batch.labels.tolist() == [[100] * 6, [101] * 6, [102] * 6]
    assert batch.index.dtype == batch.labels.dtype == torch.int64


def test_short_rows_are_padded_masked_and_not_counted():
    batch = val_batch(Counting(3, short=frozenset({1})))
    assert batch.inputs["input_ids"][1].tolist() == [101, 101, 101, 0, 0, 0]
    assert batch.inputs["attention_mask"].tolist() == [[1] * 6, [1, 1, 1, 0, 0, 0], [1] * 6]
    assert batch.labels[1].tolist() == [101, 101, 101, -100, -100, -100]


def test_evaluation_goes_through_all_rows_in_order():
    batches = list(eval_batches(Counting(7, offset=20), 3))
    assert [batch.index.tolist() for batch in batches] == [[20, 21, 22], [23, 24, 25], [26]]


def bundle():
    return DataBundle(
        train=Counting(3),
        val=Counting(2, offset=3),
        task=TaskName.language,
        vocab_size=200,
        input_shape=None,
        num_classes=None,
        fingerprint="0",
        description="counting",
    )


def test_the_sample_table_maps_indices_to_ids_and_domains(tmp_path):
    path = tmp_path / "samples.parquet"
    path.write_text("an older file")
    write_samples({"train": bundle().train, "val": bundle().val}, path)
    table = pq.read_table(path)
    assert table.schema.names == ["index", "sample_id", "domain", "split"]
    assert str(table.schema.field("index").type) == "int64"
    assert table.to_pydict() == {
        "index": [0, 1, 2, 3, 4],
        "sample_id": ["row-100", "row-101", "row-102", "row-100", "row-101"],
        "domain": ["even", "odd", "even", "even", "odd"],
        "split": ["train", "train", "train", "val", "val"],
    }
    assert [file.name for file in tmp_path.iterdir()] == ["samples.parquet"]


def test_a_failed_write_leaves_the_old_table(tmp_path, monkeypatch):
    path = tmp_path / "samples.parquet"
    path.write_text("an older file")
    broken = bundle()
    monkeypatch.setattr(broken.val, "domains", ["even"])
    with pytest.raises(IndexError):
        write_samples({"train": broken.train, "val": broken.val}, path)
    assert path.read_text() == "an older file"
    assert [file.name for file in tmp_path.iterdir()] == ["samples.parquet"]
