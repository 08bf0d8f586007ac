"""What all benchmarks share: interleaved timing, quartiles of paired ratios, a table, and JSON beside it."""

import ctypes
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import psutil
import torch
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).resolve().parent / "results"

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h's names for mallopt


@dataclass(frozen=True)
class Ratio:
    """Quartiles of a quantity's ratios to its baseline, each pair measured side by side."""

    median: float
    low: float
    high: float
    pairs: int

    @classmethod
    def of(cls, values: list[float], baseline: list[float]) -> "Ratio":
        """Ratios of paired measurements; at least two pairs."""
        low, median, high = statistics.quantiles(
            [a / b for a, b in zip(values, baseline, strict=True)], n=4, method="inclusive"
        )
        return cls(median, low, high, len(values))

    def __str__(self) -> str:
        return f"{self.median:.3f} [{self.low:.3f}, {self.high:.3f}]"


def keep_freed_memory() -> None:
    """Have glibc keep what is freed in this process from here on; other systems' allocators stay as they are.

    It returns large blocks to the kernel and faults them in again at each step, which takes up to half of a
    step and falls on one side of a pair or the other by chance. The same as `MALLOC_MMAP_MAX_=0
    MALLOC_TRIM_THRESHOLD_=20000000000` in the environment.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, -1)  # never


def timed(call: Callable[[], object]) -> float:
    """Seconds that the call takes, device work included."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def interleave(
    calls: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 1, settle: float = 0.0
) -> dict[str, list[float]]:
    """Seconds of each call, in `rounds` rounds of one call each. What comes first, and what after what, turns
    from round to round.

    Args:
        settle: Seconds between two calls. Threads of one library's pool keep a core busy for a while after a
            call, which would be charged to the next call of another library's.
    """
    names = list(calls)
    times: dict[str, list[float]] = {name: [] for name in names}
    for r in range(-warmup, rounds):
        turned = names[r // 2 % len(names) :] + names[: r // 2 % len(names)]
        for name in turned if r % 2 == 0 else reversed(turned):
            time.sleep(settle)
            seconds = timed(calls[name])
            if r >= 0:
                times[name].append(seconds)
    return times


def machine() -> dict[str, str]:
    """The machine in words."""
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].partition(":")[2].strip() if names else cpu
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "cpu": cpu,
        "threads": str(torch.get_num_threads()),
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "gpu": gpu,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def report(name: str, columns: list[str], rows: list[dict[str, object]]) -> Path:
    """Print the rows as a table and write them, with the machine, to `results/<name>.json`; returns that
    path.
    """
    table = Table(title=f"{name} on {machine()['cpu']}, {machine()['threads']} threads")
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*(str(row[column]) for column in columns))
    Console().print(table)
    plain = [{k: asdict(v) if isinstance(v, Ratio) else v for k, v in row.items()} for row in rows]
    path = RESULTS / f"{name}.json"
    RESULTS.mkdir(exist_ok=True)
    record = {
        "name": name,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "rows": plain,
    }
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return path
