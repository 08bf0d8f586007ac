"""Files that are whole or not there, with what is needed to tell later whether they still are."""

import errno
import hashlib
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import numpy as np
from filelock import FileLock, Timeout

from ghost.atomic import write_atomically
from ghost.errors import StoreError

_PIECE = 1 << 20  # bytes


@dataclass(frozen=True)
class FileRecord:
    """What a written file is known by.

    Attributes:
        name: Its name in the store's folder.
        size: Its length in bytes.
        sha256: The checksum of its bytes, in hexadecimal.
    """

    name: str
    size: int
    sha256: str


def write_recorded(path: Path, pieces: Iterable[bytes | memoryview]) -> FileRecord:
    """Write a whole file or none; its name is safe only after `ghost.atomic.sync`."""
    digest, size = hashlib.sha256(), 0

    def write(file: BinaryIO) -> None:
        nonlocal size
        for piece in pieces:
            digest.update(piece)
            size += file.write(piece)

    write_atomically(path, write)
    return FileRecord(path.name, size, digest.hexdigest())


def release(path: Path) -> None:
    """Let the system drop a file that is safe on disk from its cache, where it can be told to.

    A store larger than memory would fill the cache, push out what is read again and again, and be written
    slower once it has.
    """
    if sys.platform == "linux":
        file = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(file)


def npy_pieces(array: np.ndarray) -> Iterator[bytes | memoryview]:
    """The bytes of an `.npy` file of a contiguous array."""
    header = BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(array))
    yield header.getvalue()
    yield from pieces(array.reshape(-1).view(np.uint8).data)


def pieces(data: memoryview) -> Iterator[memoryview]:
    """The data in pieces that stay in the processor's cache from the checksum to the file."""
    return (data[start : start + _PIECE] for start in range(0, len(data), _PIECE))


def damaged(path: Path, how: str) -> StoreError:
    """The error that a file is no longer what it was."""
    return StoreError(f"{path} {how}: restore it, or build the store anew.")


def check_size(directory: Path, record: FileRecord) -> None:
    """Compare a file's length with its record.

    Raises:
        StoreError: The file is missing or has another length.
    """
    path = directory / record.name
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise damaged(path, "is missing") from None
    if size != record.size:
        raise damaged(path, f"has {size} bytes and was written with {record.size}")


def check_bytes(directory: Path, record: FileRecord) -> None:
    """Compare a file's length and checksum with its record.

    Raises:
        StoreError: The file is missing or is not what was written.
    """
    check_size(directory, record)
    path = directory / record.name
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != record.sha256:
        raise damaged(path, f"is not what was written (sha256 {digest[:12]}, not {record.sha256[:12]})")


def make_folder(directory: Path) -> None:
    """Make a folder where there is none.

    Raises:
        StoreError: It cannot be made, or a file is there.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(
            f"{directory} cannot be made a folder ({error.strerror}): choose another."
        ) from error


@contextmanager
def writing(directory: Path, what: str, goes_on: str = "") -> Iterator[None]:
    """Say in one sentence what the system refused to write.

    Raises:
        StoreError: In place of an `OSError`.
    """
    try:
        yield
    except OSError as error:
        free = shutil.disk_usage(directory).free
        remedy = "make room" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "make it writable"
        raise StoreError(
            f"{directory}: {what} cannot be written ({error.strerror}, {free} bytes are free): what is there "
            f"is safe; {remedy}, and the same command goes on{goes_on}."
        ) from error


@contextmanager
def held(path: Path, seconds: float, otherwise: str) -> Iterator[None]:
    """Hold a lock that ends with the process at the latest.

    Args:
        seconds: How long to wait for it; -1 for as long as it takes.
        otherwise: What it means that another holds it.

    Raises:
        StoreError: Another holds it.
    """
    # Not a lock of the thread: a writer may be closed by another one than opened it.
    lock = FileLock(path, thread_local=False)
    try:
        lock.acquire(timeout=seconds)
    except Timeout:
        raise StoreError(otherwise) from None
    try:
        yield
    finally:
        lock.release()


def changing(directory: Path) -> AbstractContextManager[None]:
    """Hold the folder's lock, which whoever replaces its manifest or tombstones takes."""
    return held(directory / ".lock", -1, "")
