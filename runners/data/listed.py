"""Training on the samples that a list names, or on all others: `data.keep` and `data.drop`."""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from omegaconf import DictConfig

from analysis.lists import read_list
from conf.errors import ConfigError
from runners.data.base import DataBundle, Item, SampleSet

log = logging.getLogger(__name__)


class Chosen(SampleSet):
    """Some samples of another set, with running indices of their own."""

    def __init__(self, base: SampleSet, positions: Sequence[int], offset: int) -> None:
        self.base = base
        self.positions = positions
        self.offset = offset
        self.layout = base.layout
        self.sample_ids = [base.sample_ids[i] for i in positions]
        self.domains = [base.domains[i] for i in positions]

    def __getitem__(self, i: int) -> Item:
        inputs, labels, _ = self.base[self.positions[i]]
        return inputs, labels, self.offset + i

    def preview(self, i: int, width: int = 80) -> str:
        return self.base.preview(self.positions[i], width)


def restrict(bundle: DataBundle, cfg: DictConfig) -> DataBundle:
    """The bundle with the training samples that `data.keep` names, or without those of `data.drop`.

    Samples are numbered anew, in their old order; validation stays as it is. Ids of the list that are no
    training samples are counted in a warning.

    Raises:
        AnalysisError: The list cannot be read.
        ConfigError: No training sample would be left, or none be dropped.
    """
    key = "keep" if cfg.keep is not None else "drop"
    if cfg[key] is None:
        return bundle
    listed = set(read_list(Path(cfg[key])))
    named = [name in listed for name in bundle.train.sample_ids]
    _say_unknown(f"data.{key}={cfg[key]}", len(listed), sum(named))
    positions = [i for i, is_named in enumerate(named) if is_named == (key == "keep")]
    if not positions:
        raise ConfigError(f"data.drop={cfg.drop} names every training sample: leave some to train on")
    train = Chosen(bundle.train, positions, 0)
    what = f"{len(train)} of {len(named)} training samples, by data.{key}={cfg[key]}"
    return replace(
        bundle,
        train=train,
        val=Chosen(bundle.val, range(len(bundle.val)), len(train)),
        fingerprint=_fingerprint(bundle.fingerprint, train.sample_ids),
        description=f"{bundle.description}; {what}",
    )


def _say_unknown(setting: str, listed: int, known: int) -> None:
    if known == 0:
        raise ConfigError(
            f"{setting} names no training sample of this data: give a list of sample ids that this data has, "
            "with the data's settings that the list was made for"
        )
    if known < listed:
        log.warning("%s: %d of its %d ids are no training samples here.", setting, listed - known, listed)


def _fingerprint(whole: str, sample_ids: Sequence[str]) -> str:
    """SHA-256 (hex) over the whole data's and the ids left."""
    digest = hashlib.sha256(whole.encode())
    for name in sample_ids:
        digest.update(f"\0{name}".encode())
    return digest.hexdigest()
