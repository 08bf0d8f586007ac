"""Which benchmarks there are: every module of this package that has a `main`, but for the suite's own."""

import ast
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
OWN = frozenset({"__init__", "__main__", "common", "page", "registry"})

# Arguments of a first look, by name; one that is not here has no shorter form.
QUICK: dict[str, tuple[str, ...]] = {
    "aggregate_stream": ("--rows", "2e6", "--rounds", "2"),
    "columns": ("--rounds", "2"),
    "dtype_error": ("--steps", "20", "--batches", "2"),
    "memory": ("--runs", "2"),
    "planted": ("--seeds", "1"),
    "policies": ("--rounds", "2", "--shapes", "1"),
    "projection_pass": ("--rounds", "2", "--shapes", "1"),
    "runner_overhead": ("--steps", "4", "model=gpt2-mini"),
    "scaling": ("--rounds", "2", "--values", "2"),
    "step_overhead": ("--rounds", "2", "--shapes", "1"),
    "store_rate": ("--gigabytes", "1", "--builds", "2"),
    "store_search": ("--rows", "16384", "--rounds", "3"),
}

# What has to be typed for these, which no other run leaves behind.
NEEDS = {"retrieval": "the folder of a store"}


@dataclass(frozen=True)
class Benchmark:
    """A module that measures.

    Attributes:
        name: `python -m benchmarks.<name>` runs it, and `results/<name>.json` is what it finds.
        summary: What it answers, one paragraph.
        details: The rest of what its docstring says.
    """

    name: str
    summary: str
    details: str


def benchmarks(folder: Path = FOLDER) -> list[Benchmark]:
    """All benchmarks, by name; none is imported."""
    found = []
    for path in sorted(folder.glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        has_main = any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body)
        if path.stem not in OWN and has_main:
            summary, _, details = (ast.get_docstring(tree) or path.stem).partition("\n\n")
            found.append(Benchmark(path.stem, " ".join(summary.split()), " ".join(details.split())))
    return found
