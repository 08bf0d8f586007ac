"""`python -m benchmarks.page`: docs/benchmarks.md from `benchmarks/results`, one table a result."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.registry import FOLDER, Benchmark, benchmarks

PAGE = FOLDER.parent / "docs" / "benchmarks.md"
RESULTS = FOLDER / "results"

HEAD = """# Benchmarks

`python -m benchmarks` measures all of this again and writes this page; `--quick` takes a few minutes,
gives a first look and leaves this page alone; `python -m benchmarks NAME …` runs single ones, `--list` names
them. Each runs in a process of its own. What is compared takes turns within one process on one model, and a
ratio is the median of paired ratios with its quartiles in brackets: other work on the machine falls on both
sides. From 2026-11-23 on `columns`, `policies`, `scaling`, `second_order` and `step_overhead` keep freed
memory (`keep_freed_memory` in `benchmarks/common.py` says why). Ratios are what to read; seconds are this
machine's. The numbers are in `benchmarks/results/*.json`.
"""


def cell(value: Any) -> str:
    """One entry of a table; quartiles as `median [low, high]`."""
    if isinstance(value, Mapping) and "median" in value:
        return f"{value['median']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {cell(entry)}" for name, entry in value.items())
    return str(value).replace("|", "\\|")


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The rows as lines of a Markdown table; a row may lack columns."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [columns, ["---"] * len(columns), *([cell(row.get(c, "")) for c in columns] for row in rows)]
    return [f"| {' | '.join(line)} |" for line in lines]


def machine_in_words(record: Mapping[str, Any]) -> str:
    """When and on what a result was measured."""
    on = record["machine"]
    parts = [on["cpu"], f"{on['threads']} threads"]
    parts += [f"{on['memory']} memory"] if "memory" in on else []
    parts += [
        "no GPU" if on["gpu"] == "none" else on["gpu"],
        f"torch {on['torch']}",
        f"Python {on['python']}",
    ]
    return f"{', '.join(parts)}; {record['date'][:10]}"


def section(benchmark: Benchmark, record: Mapping[str, Any] | None) -> list[str]:
    """A benchmark's heading, what it answers, and its table."""
    lines = [f"## {benchmark.name}", "", benchmark.summary, ""]
    if record is None:
        return [*lines, f"Not measured yet: `python -m benchmarks {benchmark.name}`.", ""]
    return [*lines, *table(record["rows"]), "", f"*{machine_in_words(record)}.*", "", benchmark.details, ""]


def page(known: Sequence[Benchmark], records: Mapping[str, Mapping[str, Any]]) -> str:
    """The whole page, benchmarks in the order given."""
    sections = [line for benchmark in known for line in section(benchmark, records.get(benchmark.name))]
    return "\n".join([HEAD, *sections]).rstrip() + "\n"


def read_records(folder: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """The results by name."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}


def write_page() -> Path:
    """Write the page and return its path."""
    PAGE.write_text(page(benchmarks(), read_records()), encoding="utf-8")
    return PAGE


if __name__ == "__main__":
    write_page()
