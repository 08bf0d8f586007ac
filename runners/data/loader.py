"""Batches from sample sets: an endless training stream that can start anywhere, and validation in order."""

import signal
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch.utils.data import DataLoader, Sampler

from analysis.samples import taking_turns
from conf.errors import ConfigError
from ghost.atomic import written_beside
from ghost.batch import Items
from ghost.loss import IGNORED_LABEL
from runners.data.base import Batch, Inputs, Item, Layout, SampleInputs, SampleSet
from runners.world import ALONE, World

ROWS_PER_WRITE = 65_536

SAMPLES_SCHEMA = pa.schema(
    [("index", pa.int64()), ("sample_id", pa.string()), ("domain", pa.string()), ("split", pa.string())]
)


def train_batches(
    train: SampleSet, batch_size: int, seed: int, shuffle: bool, num_workers: int, start_step: int = 0,
    world: World = ALONE,
) -> Iterator[Batch]:  # fmt: skip
    """The endless stream of full training batches, from step `start_step` on.

    Several processes deal the one stream's batches out in turn: step s of rank r has its batch number
    `s * world_size + r`.

    Each epoch is a fresh permutation drawn from (seed, epoch), or the samples' own order without `shuffle`.
    The epochs follow each other without a gap: a batch may hold the end of one and the start of the next, so
    every sample comes exactly once in an epoch. The batch of a step does not depend on where the stream was
    started, nor on `num_workers`.

    Raises ConfigError if `batch_size` exceeds the number of samples.
    """
    if batch_size > len(train):
        raise ConfigError(
            f"trainer.batch_size={batch_size} exceeds the {len(train)} training samples, so a batch would "
            f"hold a sample twice; use at most {len(train)}, or more data."
        )
    sampler = EpochBatches(len(train), batch_size, seed, shuffle, start_step, world)
    return _loaded(train, sampler, num_workers)


def val_batch(val: SampleSet) -> Batch:
    """All validation rows as one batch, domains taking turns: any few rows in a row speak for all of them."""
    return collate([val[i] for i in taking_turns(val.domains)], val.layout)


def val_batches_by_domain(val: SampleSet) -> dict[str, Batch]:
    """All validation rows of each domain as one batch, by domain name."""
    positions: dict[str, list[int]] = {}
    for i, domain in enumerate(val.domains):
        positions.setdefault(domain, []).append(i)
    return {domain: collate([val[i] for i in positions[domain]], val.layout) for domain in sorted(positions)}


def eval_batches(samples: SampleSet, batch_size: int) -> Iterator[Batch]:
    """All rows once, in order; the last batch may be short."""
    for number in range(-(-len(samples) // batch_size)):
        yield _eval_batch(samples, batch_size, number)


def shared_eval_batches(samples: SampleSet, batch_size: int, world: World) -> Iterator[tuple[Batch, bool]]:
    """This process's every so many of `eval_batches`, each with whether it counts.

    Every process gets as many as the others, since a split model's forward needs all of them; a batch that
    only fills up the number does not count.
    """
    batches = -(-len(samples) // batch_size)
    for first in range(0, batches, world.world_size):
        number = first + world.rank
        yield _eval_batch(samples, batch_size, number if number < batches else 0), number < batches


def _eval_batch(samples: SampleSet, batch_size: int, number: int) -> Batch:
    rows = range(number * batch_size, min((number + 1) * batch_size, len(samples)))
    return collate([samples[i] for i in rows], samples.layout)


def ordered_batches(samples: SampleSet, batch_size: int, numbers: range, num_workers: int) -> Iterator[Batch]:
    """The batches of these numbers among all of the samples in order; the last of all may be short."""
    rows = [
        list(range(number * batch_size, min((number + 1) * batch_size, len(samples)))) for number in numbers
    ]
    return _loaded(samples, rows, num_workers)


def _loaded(samples: SampleSet, batches: Iterable[list[int]], num_workers: int) -> Iterator[Batch]:
    """The batches of samples at these positions."""
    return iter(
        DataLoader(
            samples,
            batch_sampler=batches,
            num_workers=num_workers,
            collate_fn=partial(collate, layout=samples.layout),
            # Of its own, so that starting a stream leaves the global random state alone.
            generator=torch.Generator(),
            worker_init_fn=_leave_signals,
        )
    )


def _leave_signals(worker: int) -> None:
    """A scheduler, and Ctrl-C, signals a run's whole process group; the training process alone answers, and
    ends its loaders when it is done.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


class EpochBatches(Sampler[list[int]]):
    """One process's endless batches of positions in `range(size)`; an epoch's permutation depends on
    (seed, epoch).
    """

    def __init__(
        self, size: int, batch_size: int, seed: int, shuffle: bool, start_step: int, world: World
    ) -> None:
        self.size = size
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.start_step = start_step
        self.world = world

    def __iter__(self) -> Iterator[list[int]]:
        positions = self._positions()
        own = slice(self.world.rank * self.batch_size, (self.world.rank + 1) * self.batch_size)
        while True:
            yield list(islice(positions, self.world.world_size * self.batch_size))[own]

    def _positions(self) -> Iterator[int]:
        """What all processes take, in order."""
        taken = self.start_step * self.world.world_size * self.batch_size
        epoch, offset = divmod(taken, self.size)
        while True:
            yield from self._epoch(epoch)[offset:]
            epoch, offset = epoch + 1, 0

    def _epoch(self, epoch: int) -> Sequence[int]:
        if not self.shuffle:
            return range(self.size)
        return np.random.default_rng([self.seed, epoch]).permutation(self.size).tolist()


def collate(items: Sequence[Item], layout: Layout) -> Batch:
    """Items as one batch: rows are padded on the right to the layout's widths, with labels -100.

    Where the samples bring no `attention_mask` of their own, the batch has one only if a row was shorter.
    """
    inputs, labels, numbers = zip(*items, strict=True)
    if layout.label_width is None:
        joined = torch.stack(labels)  # [b]
    else:
        joined = _padded(labels, layout.label_width, IGNORED_LABEL)  # [b, T]
    return Batch(_joined_inputs(inputs, layout), joined, torch.tensor(numbers, dtype=torch.int64))


def _joined_inputs(inputs: Sequence[SampleInputs], layout: Layout) -> Inputs:
    tensors = [sample for sample in inputs if isinstance(sample, torch.Tensor)]
    if tensors:
        return torch.stack(tensors)
    samples = [sample for sample in inputs if isinstance(sample, dict)]
    batch = {key: _column(key, [sample[key] for sample in samples], layout) for key in samples[0]}
    rows = [sample["input_ids"] for sample in samples]
    width = layout.widths["input_ids"]
    if "attention_mask" not in batch and any(len(row) < width for row in rows):
        batch["attention_mask"] = _padded([torch.ones_like(row) for row in rows], width, 0)
    return batch


def _column(key: str, values: list[torch.Tensor], layout: Layout) -> torch.Tensor | Items:
    """One input of all samples."""
    if key in layout.items:
        counts = torch.tensor([len(value) for value in values])
        return Items(torch.cat(values), torch.repeat_interleave(torch.arange(len(values)), counts))
    return _padded(values, layout.widths[key], layout.padding_id if key == "input_ids" else 0)


def _padded(rows: Sequence[torch.Tensor], width: int, value: int) -> torch.Tensor:
    padded = torch.full((len(rows), width), value, dtype=torch.int64)  # [b, T]
    for i, row in enumerate(rows):
        padded[i, : len(row)] = row
    return padded


def write_samples(sets: Mapping[str, SampleSet], path: Path) -> None:
    """Writes a Parquet row (`index`, `sample_id`, `domain`, `split`) for every sample of the sets, which go
    by the name of their split; atomically.
    """
    with written_beside(path) as partial_path, pq.ParquetWriter(partial_path, SAMPLES_SCHEMA) as writer:
        for split, samples in sets.items():
            for start in range(0, len(samples), ROWS_PER_WRITE):
                writer.write_batch(_sample_rows(samples, split, start))


def _sample_rows(samples: SampleSet, split: str, start: int) -> pa.RecordBatch:
    rows = range(start, min(start + ROWS_PER_WRITE, len(samples)))
    columns = [
        [samples.offset + i for i in rows],
        [samples.sample_ids[i] for i in rows],
        [samples.domains[i] for i in rows],
        [split] * len(rows),
    ]
    return pa.record_batch(columns, schema=SAMPLES_SCHEMA)
