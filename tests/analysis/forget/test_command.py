"""The command that deletes samples: from stores, from whole folders, typed again after a kill, refusals."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from analysis.errors import AnalysisError
from analysis.forget import artefact, folder
from analysis.forget.command import compact, forget, main
from analysis.forget.verification import verify_gone
from analysis.report.page import GENERATOR
from conf.command import FAILED, MISTAKE
from ghost import ProjectionStore
from ghost.layout import Layout
from ghost.store import StoreWriter
from tests.analysis.conftest import MakeRun

ROWS, WIDTH = 9, 5

Command = Callable[..., int]


@pytest.fixture
def command(in_process: Callable[..., int]) -> Command:
    """Runs a deletion and returns the exit code."""
    return partial(in_process, main)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A store of nine samples in three shards, and the table of their names."""
    values = torch.arange(ROWS * WIDTH, dtype=torch.float32).view(ROWS, WIDTH) + 1
    layout = Layout.of([("w", (WIDTH, 1), (WIDTH, 1))])
    with StoreWriter(tmp_path / "store", layout, {}, {}, batches_per_shard=1) as writer:
        for ids in torch.arange(ROWS).split(3):
            writer.append(ids, values[ids])
    write_names(tmp_path / "store", list(range(ROWS)))
    return tmp_path / "store"


def write_names(folder: Path, indices: list[int]) -> None:
    names = [f"mail/{i}#0" for i in indices]
    table = pa.table({"index": indices, "sample_id": names, "domain": ["mail"] * len(names)})
    pq.write_table(table, folder / "samples.parquet")


def left(folder: Path) -> list[int]:
    names = pq.read_table(folder / "samples.parquet")["index"].to_pylist()
    assert names == ProjectionStore.open(folder).sample_ids.tolist()
    return names


def test_samples_go_from_the_store_and_from_its_table(store: Path) -> None:
    forget([store], {"mail/4#0", "mail/7#0", "mail/0#0"})
    assert left(store) == [1, 2, 3, 5, 6, 8]


def test_what_a_killed_writer_left_is_cleared(store: Path, command: Command) -> None:
    (store / ".samples.parquet.17.partial").write_bytes(b"mail/4#0")
    assert command("paths=store", "ids='mail/4#0'", "compact=true") == 0
    assert not [path for path in store.iterdir() if b"mail/4#0" in path.read_bytes()]


def test_an_unknown_sample_is_said(store: Path, caplog: pytest.LogCaptureFixture) -> None:
    forget([store], {"mail/4#0", "mail/41#0"})
    assert caplog.messages[0].startswith("Nothing names mail/41#0 (did you mean mail/")
    assert left(store) == [0, 1, 2, 3, 5, 6, 7, 8]


def test_compacting_leaves_no_byte(store: Path, command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    row = np.asarray(ProjectionStore.open(store).matrix()[4], dtype=np.float32).tobytes()
    assert command("paths=store", "ids='mail/4#0'") == 0
    assert "until compact=true" in capsys.readouterr().err
    assert any(row in path.read_bytes() for path in store.iterdir())
    assert [finding.why for finding in verify_gone([store], {"mail/4#0"})] == [
        "has rows of deleted samples until compact=true rewrites it"
    ]
    assert command("paths=[store]", "compact=true") == 0
    assert "Verified" in capsys.readouterr().err
    files = [path.read_bytes() for path in store.iterdir()]
    assert not any(row in content or b"mail/4#0" in content for content in files)
    assert left(store) == [0, 1, 2, 3, 5, 6, 7, 8]
    ProjectionStore.open(store).verify()


def test_all_below_a_folder_is_cleaned_at_once(
    store: Path, command: Command, make_run: MakeRun, tmp_path: Path
) -> None:
    run = make_run("outputs/run")
    store.rename(run / "projections")
    lists = tmp_path / "outputs/lists"
    lists.mkdir()
    wanted = pq.read_table(run / "samples.parquet")["sample_id"][7].as_py()
    (lists / "keep.txt").write_text(f"{wanted}\nmail/4#0\nmail/5#0\n")
    (lists / "found.csv").write_text('"query","sample_id"\n"q","mail/4#0"\n"q","mail/5#0"\n')
    assert command("paths=outputs", f"ids=['{wanted}','mail/4#0']", "compact=true") == 0
    assert (lists / "keep.txt").read_text() == "mail/5#0\n"
    assert (lists / "found.csv").read_text() == '"query","sample_id"\n"q","mail/5#0"\n'
    assert 4 not in left(run / "projections")
    assert wanted not in pq.read_table(run / "values.parquet")["sample_id"].to_pylist()


def test_what_names_a_sample_and_is_not_rewritten_is_reported(
    store: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    (store / "config.yaml").write_text("ids: [mail/4#0, mail/44#0]\n")
    (store / "run.log").write_text("mail/4#01\n")
    assert command("paths=store", "ids='mail/4#0'", "compact=true") == FAILED
    printed = capsys.readouterr().err
    assert f"{store / 'config.yaml'} has the bytes of 'mail/4#0'" in printed
    assert "run.log" not in printed
    assert "Verified" not in printed


KILLED_AT = range(7)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_killed_between_files_and_typed_again_it_ends_complete(
    store: Path, make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: bool
) -> None:
    def drawn(run: Path) -> list[Path]:
        names = pq.read_table(run / "values.parquet")["sample_id"].to_pylist()
        (run / "plots").mkdir(exist_ok=True)
        (run / "plots/top_bottom.png").write_text("\n".join(names))
        return []

    page = f'<meta name="generator" content="{GENERATOR}">'  # drawing real ones takes seconds
    monkeypatch.setattr("analysis.forget.command.write_run_report", lambda _, path, __: path.write_text(page))
    monkeypatch.setattr(folder, "plot_run", drawn)
    replace, ended = artefact.replace, 0
    for number in KILLED_AT:
        run = make_run(f"all{number}/run")
        drawn(run)
        wanted = pq.read_table(run / "values.parquet")["sample_id"][3].as_py()
        (run / "keep.txt").write_text(f"{wanted}\nother\n")
        (run / "report.html").write_text(page + wanted)
        calls = iter(range(100))

        def killed(path: Path, write: Callable, number: int = number, calls: Iterator[int] = calls) -> None:
            last = next(calls) == number
            if not last or after:
                replace(path, write)
            if last:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            for name in ("tables", "lists", "scores"):
                patch.setattr(f"analysis.forget.{name}.replace", killed)
            with suppress(KeyboardInterrupt):
                forget([run.parent], {wanted})
                ended += 1
        forget([run.parent], {wanted})
        assert verify_gone([run.parent], {wanted}) == []
        assert (run / "plots/top_bottom.png").is_file()
        assert not [path for path in run.glob("*.html") if wanted in path.read_text()]
        assert (run / "keep.txt").read_text() == "other\n"
    assert 1 <= ended <= len(KILLED_AT) - 4  # killed at each of its files, and beyond the last not at all


def test_a_store_whose_names_were_left_by_a_kill_is_finished(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("analysis.forget.tables.replace", killed)
        with pytest.raises(KeyboardInterrupt):
            forget([store], {"mail/4#0"})
    forget([store], {"mail/4#0"})
    compact([store])
    assert 4 not in left(store)
    assert verify_gone([store], {"mail/4#0"}) == []


def test_mistakes_are_one_sentence(
    store: Path, command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*words: str) -> str:
        capsys.readouterr()
        assert command(*words) == MISTAKE
        printed = capsys.readouterr().err
        assert "Traceback" not in printed
        return printed.splitlines()[-1]

    assert "nothing is named to delete from" in refused()
    assert "no sample is named" in refused("paths=store")
    assert "nowhere is not there" in refused("paths=nowhere", "compact=true")
    assert "tracking.uri=sqlite:///a.db has no effect" in refused(
        "paths=store", "compact=true", "tracking.uri=sqlite:///a.db"
    )
    assert "there is no tracking store" in refused("runs=" + "0" * 32, "ids=a")
    (tmp_path / "picture.png").touch()
    assert "picture.png is no list of samples" in refused("paths=picture.png", "ids=a")
    names = (store / "samples.parquet").read_bytes()
    (store / "samples.parquet").write_bytes(b"nothing")
    assert "samples.parquet is damaged" in refused("paths=store", "ids='mail/4#0'")
    (store / "samples.parquet").unlink()
    assert "samples.parquet is missing" in refused("paths=store", "ids='mail/4#0'")
    (store / "samples.parquet").write_bytes(names)
    assert left(store) == list(range(ROWS))


def test_a_table_that_cannot_be_written_is_one_sentence(
    store: Path, command: Command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(_: pa.Table, path: Path) -> None:
        path.write_bytes(b"torn")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("analysis.forget.tables.pq.write_table", full)
        assert command("paths=store", "ids='mail/4#0'") == MISTAKE
    assert "cannot be written (No space left on device)" in capsys.readouterr().err.splitlines()[-1]
    assert not list(store.glob(".*.partial"))
    assert command("paths=store", "ids='mail/4#0'") == 0
    assert 4 not in left(store)


def test_a_store_that_is_being_written_is_refused(tmp_path: Path) -> None:
    layout = Layout.of([("w", (WIDTH, 1), (WIDTH, 1))])
    writer = StoreWriter(tmp_path / "store", layout, {}, {}, batches_per_shard=1, world_size=2)
    writer.append(torch.arange(3), torch.ones(3, WIDTH))
    writer.close()
    write_names(tmp_path / "store", [0, 1, 2])
    (tmp_path / "keep.txt").write_text("mail/1#0\n")
    with pytest.raises(AnalysisError, match="is not complete, so nothing was deleted"):
        forget([tmp_path], {"mail/1#0"})
    assert (tmp_path / "keep.txt").read_text() == "mail/1#0\n"
