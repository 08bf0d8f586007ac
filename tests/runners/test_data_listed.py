from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from analysis.errors import AnalysisError
from analysis.lists import write_list
from conf.errors import ConfigError
from runners.data import build_data
from runners.data.base import DataBundle
from runners.data.loader import train_batches, val_batch
from tests.runners.conftest import data_config

DIGITS = {
    "kind": "digits", "val_samples": 297, "as_image": False, "image_size": 8, "channels": 1,
    "label_noise": 0.1,
}  # fmt: skip


def build(**lists: str) -> DataBundle:
    return build_data(data_config(**DIGITS | lists))


@pytest.fixture(scope="module")
def whole() -> DataBundle:
    return build()


@pytest.fixture(params=["txt", "csv", "parquet"])
def listed(request: pytest.FixtureRequest, whole: DataBundle, tmp_path: Path) -> tuple[str, list[str]]:
    """Every seventh training sample, in a list of each format, in another order than the data's."""
    ids = list(whole.train.sample_ids[::7])[::-1]
    path = tmp_path / f"list.{request.param}"
    write_list(pa.table({"sample_id": ids, "value": np.zeros(len(ids))}), path)
    return str(path), ids


def test_keep_and_drop_part_the_training_samples(whole: DataBundle, listed: tuple[str, list[str]]) -> None:
    path, ids = listed
    kept, left = build(keep=path), build(drop=path)
    assert kept.train.sample_ids == ids[::-1]
    assert sorted([*kept.train.sample_ids, *left.train.sample_ids]) == sorted(whole.train.sample_ids)
    assert len({bundle.fingerprint for bundle in (whole, kept, left)}) == 3
    assert f"{len(ids)} of 1500 training samples" in kept.description


def test_samples_are_the_same_and_numbered_anew(whole: DataBundle, listed: tuple[str, list[str]]) -> None:
    path, _ = listed
    left = build(drop=path)
    old = {name: i for i, name in enumerate(whole.train.sample_ids)}
    for i, name in enumerate(left.train.sample_ids):
        inputs, label, index = left.train[i]
        same = whole.train[old[name]]
        assert index == i
        assert torch.equal(inputs, same[0])
        assert label == same[1]
        assert left.train.domains[i] == whole.train.domains[old[name]]
        assert left.train.preview(i) == whole.train.preview(old[name])
    one, other = val_batch(whole.val), val_batch(left.val)
    assert torch.equal(one.inputs, other.inputs)
    assert other.index.min() == len(left.train)
    assert other.index.max() == len(left.train) + 296
    batch = next(train_batches(left.train, 32, seed=3, shuffle=True, num_workers=0))
    assert torch.equal(batch.inputs, torch.stack([left.train[i][0] for i in batch.index.tolist()]))


def test_unknown_ids_are_counted(whole: DataBundle, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "list.txt"
    path.write_text(f"{whole.train.sample_ids[3]}\nnobody\n\n{whole.val.sample_ids[0]}\n")
    assert build(keep=str(path)).train.sample_ids == [whole.train.sample_ids[3]]
    assert "2 of its 3 ids are no training samples here" in caplog.text


def test_lists_that_leave_nothing_or_change_nothing_are_refused(whole: DataBundle, tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_text("nobody\n")
    for key in ("keep", "drop"):
        with pytest.raises(ConfigError, match=rf"data.{key}={path} names no training sample"):
            build(**{key: str(path)})
    path.write_text("\n".join(whole.train.sample_ids))
    with pytest.raises(ConfigError, match="names every training sample"):
        build(drop=str(path))
    with pytest.raises(AnalysisError, match=r"missing.txt is missing"):
        build(keep="missing.txt")
