import os
import subprocess
from collections import namedtuple
from pathlib import Path

import psutil
import pytest
import torch

from conf.telemetry import disable_telemetry
from runners import environment

Mount = namedtuple("Mount", "mountpoint fstype")


def git(root: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", "-C", str(root), *identity, *arguments], check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    root = tmp_path / "repo"
    root.mkdir()
    git(root, "init")
    (root / "a.py").write_text("one\n")
    (root / ".gitignore").write_text("ignored/\n")
    git(root, "add", ".")
    git(root, "commit", "-m", "first")
    return root


def test_clean_repository(repository: Path) -> None:
    state = environment.git_state(repository)
    assert state.commit is not None
    assert len(state.commit) == 40
    assert (state.dirty, state.diff) == (False, "")


def test_diff_is_a_patch_that_names_untracked_files(repository: Path) -> None:
    (repository / "a.py").write_text("two\n")
    git(repository, "add", "a.py")  # staged changes belong to the state as well
    (repository / "new.py").write_text("new\n")
    state = environment.git_state(repository)
    assert state.dirty
    assert state.diff is not None
    assert state.diff.startswith("?? new.py\n")
    assert "-one\n+two\n" in state.diff
    git(repository, "reset", "--hard")
    (repository / "saved.patch").write_text(state.diff)
    git(repository, "apply", "saved.patch")
    assert (repository / "a.py").read_text() == "two\n"


def test_repository_without_a_commit(tmp_path: Path) -> None:
    git(tmp_path, "init")
    (tmp_path / "a.py").write_text("one\n")
    git(tmp_path, "add", ".")
    state = environment.git_state(tmp_path)
    assert state.commit is None
    assert state.dirty
    assert "+one\n" in str(state.diff)


def test_no_repository_and_someone_elses(tmp_path: Path, repository: Path) -> None:
    nothing = environment.GitState(commit=None, dirty=False, diff=None)
    assert environment.git_state(tmp_path) == nothing
    site_packages = repository / "ignored" / "site-packages"
    site_packages.mkdir(parents=True)
    (site_packages / "b.py").write_text("")
    assert environment.git_state(site_packages) == nothing


def test_git_is_not_installed(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    assert environment.git_state(repository).commit is None


def test_versions_name_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "_PACKAGES", ("torch", "no-such-package"))
    versions = environment.versions()
    assert versions["torch"] == torch.__version__
    assert versions["no-such-package"] == "not installed"
    assert versions["python"].startswith("3.")


def test_device_description_of_the_processor() -> None:
    text = environment.device_description("cpu")
    assert f"{os.cpu_count()} logical cores" in text
    assert f"{torch.get_num_threads()} torch threads" in text


def test_peak_memory_is_in_bytes_and_counts_what_is_held() -> None:
    resident = psutil.Process().memory_info().rss
    assert 0.5 * resident < environment.peak_memory_bytes() < 1e12
    before = environment.peak_memory_bytes()
    held = bytearray(os.urandom(1)) * (before + 50_000_000 - resident)
    assert environment.peak_memory_bytes() - before > 25_000_000
    del held
    assert environment.peak_device_memory_bytes("cpu") is None


@pytest.mark.parametrize(
    ("path", "kind", "network"),
    [
        ("/home/me/runs", "ext4", False),
        ("/scratch/project/runs", "lustre", True),
        ("/scratch-local/runs", "ext4", False),  # a prefix of the name, not of the path
        ("/data/auto/runs", "nfs4", True),  # mounted over the automounter's own mount
        ("/mnt/cloud", "sshfs", True),
    ],
)
def test_network_file_systems(monkeypatch: pytest.MonkeyPatch, path: str, kind: str, network: bool) -> None:
    mounts = [
        Mount("/", "ext4"),
        Mount("/scratch", "lustre"),
        Mount("/data/auto", "autofs"),
        Mount("/data/auto", "nfs4"),
        Mount("/mnt/cloud", "fuse.sshfs"),
    ]
    monkeypatch.setattr(psutil, "disk_partitions", lambda all: mounts)
    assert environment.filesystem_type(Path(path)) == kind
    assert environment.is_network_filesystem(Path(path)) is network


def test_file_system_of_a_real_path(tmp_path: Path) -> None:
    assert environment.filesystem_type(tmp_path / "not" / "there") is not None


def test_telemetry_is_off_unless_the_user_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_DISABLE_TELEMETRY", raising=False)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "false")
    disable_telemetry()
    assert os.environ["HF_HUB_DISABLE_TELEMETRY"] == "1"
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "false"
