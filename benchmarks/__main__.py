"""The suite: `python -m benchmarks [NAME …] [--quick]` runs all benchmarks, or those named, each in a process
of its own, and writes docs/benchmarks.md from what they have found. With `--quick` results go to
benchmarks/results/quick, and the page stays as it is. `--list` says what there is.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

from rich.console import Console

from benchmarks.common import RESULTS
from benchmarks.page import write_page
from benchmarks.registry import FOLDER, NEEDS, QUICK, Benchmark, benchmarks

LOOKS = RESULTS / "quick"
"""Where results of first looks are."""


def chosen(names: Sequence[str], known: Sequence[Benchmark]) -> list[Benchmark]:
    """The benchmarks of these names; without names all that need no arguments.

    Raises:
        SystemExit: There is none of a name.
    """
    by_name = {benchmark.name: benchmark for benchmark in known}
    for name in names:
        if name not in by_name:
            raise SystemExit(f"{name} is no benchmark: type one of {', '.join(by_name)}")
        if name in NEEDS:
            raise SystemExit(f"{name} needs {NEEDS[name]}: type python -m benchmarks.{name} …")
    return [by_name[name] for name in names or by_name if name not in NEEDS]


def command(benchmark: Benchmark, quick: bool) -> list[str]:
    """What runs it."""
    arguments = QUICK.get(benchmark.name, ()) if quick else ()
    return [sys.executable, "-m", f"benchmarks.{benchmark.name}", *arguments]


@contextmanager
def set_aside(result: Path, to: Path) -> Iterator[None]:
    """What is written to `result` goes to `to` in the end, and what stood there comes back."""
    before = result.read_bytes() if result.exists() else None
    try:
        yield
    finally:
        if result.exists() and result.read_bytes() != before:
            to.parent.mkdir(exist_ok=True)
            result.replace(to)
        if before is not None:
            result.write_bytes(before)


def run(benchmark: Benchmark, quick: bool) -> bool:
    """Run it in a process of its own; whether it has ended well."""
    name = f"{benchmark.name}.json"
    with set_aside(RESULTS / name, LOOKS / name) if quick else nullcontext():
        return subprocess.run(command(benchmark, quick), cwd=FOLDER.parent).returncode == 0


def main() -> int:
    """Run the suite; returns how many benchmarks have failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--quick", action="store_true", help="fewer rounds and shapes: a first look")
    parser.add_argument("--list", action="store_true", help="say what there is, and end")
    args = parser.parse_args()
    console, known = Console(), benchmarks()
    if args.list:
        for benchmark in known:
            console.print(f"{benchmark.name:18} {benchmark.summary}", highlight=False)
        return 0
    failed = []
    for benchmark in chosen(args.names, known):
        console.rule(benchmark.name)
        began = time.perf_counter()
        if not run(benchmark, args.quick):
            failed.append(benchmark.name)
        console.print(f"{benchmark.name}: {time.perf_counter() - began:.0f} s")
    console.print(f"Results are in {LOOKS}" if args.quick else f"Wrote {write_page()}")
    if failed:
        console.print(f"Failed: {', '.join(failed)}")
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
