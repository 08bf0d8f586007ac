import logging

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.datasets import load_wine

from conf.errors import ConfigError
from runners.data import build_data
from runners.data.loader import val_batch
from runners.errors import DataError
from tests.runners.conftest import data_config

BASE = {
    "kind": "table", "path": "wine", "label_field": None, "domain_field": None, "id_field": None,
    "train_samples": None, "val_samples": 30,
}  # fmt: skip


def build(seed=0, **changes):
    return build_data(data_config(seed, **{**BASE, **changes}))


def write(path, text):
    path.write_text(text)
    return str(path)


def stacked(samples):
    return np.stack([samples[i][0].numpy() for i in range(len(samples))])


@pytest.mark.parametrize(
    ("name", "rows", "columns", "classes"),
    [("breast_cancer", 569, 30, 2), ("wine", 178, 13, 3), ("iris", 150, 4, 3)],
)
def test_bundled_tables_are_whole(name, rows, columns, classes):
    bundle = build(path=name)
    assert (bundle.task, bundle.input_shape, bundle.num_classes) == ("table_classes", (columns,), classes)
    assert len(bundle.train) + len(bundle.val) == rows
    assert val_batch(bundle.val).inputs.shape == (30, columns)


def test_rows_are_standardised_by_the_training_rows_alone():
    bundle = build()
    train, val = stacked(bundle.train), stacked(bundle.val)
    np.testing.assert_allclose(train.mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(train.std(0), 1, atol=1e-6)
    assert abs(val.mean(0)).max() > 1e-3
    found = load_wine()
    train_rows = [int(name.removeprefix("wine/")) for name in bundle.train.sample_ids]
    mean, std = found.data[train_rows].mean(0), found.data[train_rows].std(0)
    for samples in (bundle.train, bundle.val):
        for i in range(0, len(samples), 10):
            row = int(samples.sample_ids[i].removeprefix("wine/"))
            np.testing.assert_allclose(samples[i][0].numpy() * std + mean, found.data[row], rtol=1e-5)
            assert int(samples[i][1]) == found.target[row]
            assert samples.domains[i] == found.target_names[found.target[row]]


def test_the_seed_picks_training_rows_and_nothing_else():
    first, again, other = (build(seed, train_samples=50) for seed in (0, 0, 1))
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert first.val.sample_ids == other.val.sample_ids
    assert set(first.train.sample_ids).isdisjoint(first.val.sample_ids)


@pytest.mark.parametrize("ending", [".csv", ".parquet"])
def test_a_file_gives_numbers_labels_ids_and_domains(tmp_path, ending):
    columns = {
        "name": [f"row{i}" for i in range(8)],
        "width": [float(i) for i in range(8)],
        "age": list(range(8, 16)),
        "kind": ["tall", "short"] * 4,
        "place": ["here", "there", "there", "here"] * 2,
    }
    path = tmp_path / f"people{ending}"
    if ending == ".csv":
        pa.csv.write_csv(pa.table(columns), path)
    else:
        pq.write_table(pa.table(columns), path)
    bundle = build(path=str(path), label_field="kind", id_field="name", domain_field="place", val_samples=2)
    assert (bundle.input_shape, bundle.num_classes) == ((2,), 2)
    for samples in (bundle.train, bundle.val):
        for i, name in enumerate(samples.sample_ids):
            row = int(name.removeprefix("row"))
            assert samples.domains[i] == columns["place"][row]
            assert int(samples[i][1]) == ["short", "tall"].index(columns["kind"][row])
    assert bundle.train.preview(0).startswith(("short: ", "tall: "))


def test_constant_columns_are_centred_and_named(tmp_path, caplog):
    path = write(tmp_path / "t.csv", "a,b,y\n1,5,0\n2,5,1\n3,5,0\n4,5,1\n")
    with caplog.at_level(logging.WARNING):
        bundle = build(path=path, label_field="y", val_samples=1)
    assert "constant in the training rows are only centred: b." in caplog.text
    assert (stacked(bundle.train)[:, 1] == 0).all()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,y\n1,0\n,1\n3,0\n", r"no finite number in row 1, column 'a' \(1 such rows\)"),
        ("a,y\nx,0\nz,1\n", r"The column 'a' of .* holds string and not numbers"),
        ("y\n0\n1\n", r"no column of numbers"),
        ("a,y\n1,0\n2,0\n", r"1 different labels in 'y'"),
        ("a,y\n1,0\n2\n", r"cannot be read as a .csv table"),
        ("a,y\n1,0\n2,1\n", r"data.val_samples=30 exceeds the 2 rows"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        build(path=write(tmp_path / "t.csv", text), label_field="y")


def test_keys_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"data.label_field=y has no effect on data.path=wine"):
        build(label_field="y")
    path = write(tmp_path / "t.csv", "a,y\n1,0\n2,1\n")
    with pytest.raises(ConfigError, match=r"data.label_field=None is no column of .*; it has a, y"):
        build(path=path)
    with pytest.raises(ConfigError, match=r"data.id_field=z is no column"):
        build(path=path, label_field="y", id_field="z")
    with pytest.raises(
        DataError, match=r"must be one of breast_cancer, wine, iris, or a .csv or .parquet file"
    ):
        build(path="boston")
    with pytest.raises(DataError, match=r"are left to train on"):
        build(train_samples=178)
