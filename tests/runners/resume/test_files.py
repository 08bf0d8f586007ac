"""Checkpoint folders."""

import subprocess
from pathlib import Path

import pytest

from runners.resume import files
from runners.resume.files import Facts


def write(out: Path, step: int, keep: int = 2) -> Path:
    partial = files.partial_folder(out, step)
    (partial / "training.pt").write_bytes(bytes([step] * 100))
    return files.seal(partial, Facts(step, 1, "f", 0), keep)


def steps(out: Path) -> list[int]:
    return [step for step, _ in files.folders(out)]


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (2, 4, 6, 10):
        write(tmp_path, step)
    assert steps(tmp_path) == [10, 6]
    write(tmp_path, 8)  # a run that has gone on behind 6, since 10 is damaged
    assert steps(tmp_path) == [8, 6]
    found = files.newest_whole(tmp_path)
    assert found is not None
    assert found.facts == Facts(8, 1, "f", 0)


def test_the_list_of_checksums_is_in_the_usual_form(tmp_path: Path) -> None:
    folder = write(tmp_path, 1)
    subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=folder, check=True)


@pytest.mark.parametrize("name", ["training.pt", "checkpoint.json", "SHA256SUMS"])
@pytest.mark.parametrize("how", ["missing", "empty", "cut", "one bit", "spoilt"])
def test_damage_is_found_and_the_one_before_taken(
    name: str, how: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, 1)
    path = write(tmp_path, 2) / name
    content = path.read_bytes()
    if how == "missing":
        path.unlink()
    else:
        flipped = bytes([content[0] ^ 1]) + content[1:]
        spoilt = {"empty": b"", "cut": content[:-1], "one bit": flipped, "spoilt": b"\xff" * 50}
        path.write_bytes(spoilt[how])
    found = files.newest_whole(tmp_path)
    if (name, how) == ("SHA256SUMS", "cut"):  # a line without its end is the line
        assert found is not None
        assert found.facts.step == 2
        return
    assert found is not None
    assert found.facts.step == 1
    assert str(path.parent) in caplog.text


def test_a_half_written_one_is_none(tmp_path: Path) -> None:
    write(tmp_path, 1)
    (files.partial_folder(tmp_path, 2) / "training.pt").write_bytes(b"half")
    assert steps(tmp_path) == [1]
