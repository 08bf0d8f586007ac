"""What a run ran on: code state, library versions, device, memory and file system."""

import logging
import platform
import resource
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import psutil
import torch

log = logging.getLogger(__name__)

_PACKAGES = ("ghostrunner", "torch", "transformers", "mlflow", "numpy", "hydra-core")
_GIT_TIMEOUT = 10.0  # seconds; a cold network file system can take long to answer

# Locks on these are missing or unreliable, and SQLite needs them.
_NETWORK_FILESYSTEMS = frozenset((
    "nfs", "nfs3", "nfs4", "cifs", "smb2", "smb3", "smbfs", "afs", "9p", "lustre", "gpfs", "mmfs", "beegfs",
    "beegfs_nodev", "fhgfs", "panfs", "wekafs", "pvfs2", "orangefs", "ceph", "glusterfs", "gfs2", "ocfs2",
    "sshfs", "s3fs", "gcsfuse", "rclone", "juicefs",
))  # fmt: skip


PROJECT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class GitState:
    """The code's state: `commit` and `diff` are None outside a repository (an installed package, say).

    `dirty` is also true for untracked files that are not ignored. `diff` is a patch against `commit` that
    `git apply` takes, headed by the names of untracked files; empty where nothing differs.
    """

    commit: str | None
    dirty: bool
    diff: str | None


def git_state(root: Path) -> GitState:
    """Commit and uncommitted changes of the repository that tracks the files in `root`."""
    # A virtual environment may lie inside someone else's repository: only files that git tracks count.
    if not _git(root, "ls-files", "--", "."):
        return GitState(commit=None, dirty=False, diff=None)
    commit = _git(root, "rev-parse", "--verify", "--quiet", "HEAD")
    status = _git(root, "status", "--porcelain", "--untracked-files=normal") or ""
    untracked = [line for line in status.splitlines() if line.startswith("??")]
    # Before the first commit there is no HEAD; the index is all there is to compare with.
    patch = _git(root, "diff", "--no-color", "--no-ext-diff", *(["HEAD"] if commit else ["--cached"])) or ""
    diff = "".join(f"{line}\n" for line in untracked) + patch
    return GitState(commit=commit.strip() if commit else None, dirty=bool(status), diff=diff)


def _git(root: Path, *arguments: str) -> str | None:
    """Output of a git command run in `root`; None where git is missing, too slow or refuses."""
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments],
            capture_output=True, encoding="utf-8", errors="replace", timeout=_GIT_TIMEOUT, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        log.info("git state not recorded: %s", error)
        return None
    if done.returncode != 0:
        log.debug("git %s in %s: %s", arguments[0], root, done.stderr.strip())
        return None
    return done.stdout


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide a run's numbers, or "not installed"."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def device_description(device: torch.device | str) -> str:
    """One line about a device: processor, cores, threads and memory, or the GPU's name and memory."""
    device = torch.device(device)
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return (
            f"{properties.name}, {properties.total_memory / 1e9:.0f} GB, "
            f"compute capability {properties.major}.{properties.minor}, CUDA {torch.version.cuda}"
        )
    if device.type == "cpu":
        memory = psutil.virtual_memory().total / 1e9
        return (
            f"{_cpu_name()}, {psutil.cpu_count(logical=True)} logical cores, "
            f"{torch.get_num_threads()} torch threads, {memory:.0f} GB"
        )
    return str(device)


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def peak_memory_bytes() -> int:
    """Largest resident set of this process so far, in bytes of host memory."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB, macOS in bytes


def peak_device_memory_bytes(device: torch.device | str) -> int | None:
    """Largest memory that tensors held on a CUDA device so far, in bytes; None for other devices."""
    device = torch.device(device)
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def is_network_filesystem(path: Path) -> bool:
    """Whether `path`, which need not exist yet, lies on a network or cluster file system."""
    return filesystem_type(path) in _NETWORK_FILESYSTEMS


def filesystem_type(path: Path) -> str | None:
    """Type of the file system that holds `path`, lower case ("ext4", "nfs4"); None where it is unknown."""
    resolved = path.resolve()
    mounts = [m for m in psutil.disk_partitions(all=True) if resolved.is_relative_to(m.mountpoint)]
    if not mounts:
        return None
    # The deepest mount holds the path; of several at one place (autofs, then nfs) the latest does.
    deepest = max(enumerate(mounts), key=lambda item: (len(Path(item[1].mountpoint).parts), item[0]))[1]
    return deepest.fstype.lower().removeprefix("fuse.")
