"""The sections on projected gradients: the store of a projection run, and what projections lose."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from analysis.distortion import draw_distortion, read_report
from analysis.errors import AnalysisError
from analysis.report.facts import read_json, setting
from analysis.report.numbers import correlation, count, percent, size
from analysis.report.page import Block, Column, Command, Facts, Picture, Section, Table, Text
from analysis.report.training import COVERAGE_FILE, finite
from analysis.runs import Run
from ghost import GhostError, ProjectionStore

STORE_FOLDER = "projections"
DISTORTION_FILE = "distortion.json"
_LARGEST = 24  # parameters


def store_of(run: Run) -> ProjectionStore:
    """The store that a projection run wrote.

    Raises:
        AnalysisError: It is not where the run put it, or damaged.
    """
    folder = Path(setting(run.config, "engine.store") or run.directory / STORE_FOLDER)
    try:
        return ProjectionStore.open(folder)
    except GhostError as error:
        raise AnalysisError(f"The store is not to be read: {error}") from error


def store_section(run: Run) -> Section:
    """What the store holds, and what a row is made of."""
    store = store_of(run)
    whole = [] if store.complete else [Text("The store is not complete: other ranks have not ended yet.")]
    blocks: list[Block] = [
        *whole,
        Facts(_store_facts(store)),
        Command(f"python -m runners.search store={store.directory}"),
    ]
    return Section("The store", [*blocks, _layout_table(store)])


def _store_facts(store: ProjectionStore) -> list[tuple[str, str]]:
    projection = store.projection
    return [
        ("Samples", count(len(store))),
        ("Numbers a sample", count(store.layout.width)),
        ("Stored as", store.dtype),
        ("Size on disk", size(store.nbytes)),
        ("Projection matrices", f"{projection['kind']}, seed {projection['seed']}"),
        ("Numbers a parameter, about", count(projection["rank_total"])),
        *((f"Fingerprint of {name}", value[:16]) for name, value in store.fingerprints.items()),
    ]


def _layout_table(store: ProjectionStore) -> Table:
    slices = sorted(store.layout.slices, key=lambda part: -part.size_out * part.size_in)
    rows = [
        (
            part.parameter,
            f"{count(part.size_out)} × {count(part.size_in)}",
            f"{count(part.k_out)} × {count(part.k_in)}",
            count(part.k_out * part.k_in),
        )
        for part in slices[:_LARGEST]
    ]
    shown = f"The {len(rows)} largest of {len(slices)}" if len(rows) < len(slices) else "The"
    columns = [Column("Parameter", "id"), Column("Gradient"), Column("Kept as"), Column("Numbers")]
    return Table(f"{shown} parameters of a row", columns, rows)


def projected_section(run: Run) -> Section:
    """How much of the model a row speaks of."""
    path = run.directory / COVERAGE_FILE
    found = read_json(path)
    try:
        share, left_out = found["projected_parameter_share"], list(found["left_out"])
    except (KeyError, TypeError) as error:
        raise AnalysisError(f"{path} is damaged: it lacks {error}.") from error
    text = (
        f"Rows speak of {percent(share)} of the {count(found['parameters'])} trainable parameters' entries."
    )
    blocks: list[Block] = [Text(text)]
    if left_out:
        rows = [(str(name),) for name in left_out[:_LARGEST]]
        caption = f"Left out: {len(left_out)} parameters" + (
            f", the first {_LARGEST} of them" if len(left_out) > _LARGEST else ""
        )
        blocks.append(Table(caption, [Column("Parameter", "id")], rows))
    return Section("What rows speak of", blocks)


def lost_section(run: Run) -> Section:
    """What the run measured of its own store's error.

    Raises:
        AnalysisError: It measured nothing.
    """
    rms, rank = finite(run, "distortion/rms"), finite(run, "distortion/spearman")
    if not rms:
        raise AnalysisError(
            f"{run.directory} measured no error of its projections: engine.distortion_samples asks for it."
        )
    facts = [
        ("Error of inner products, as a share of the norms", percent(rms[-1])),
        ("Rank correlation with the exact ones", correlation(rank[-1] if rank else None)),
    ]
    return Section("What the projection loses", [Facts(facts)])


def distortion_section(run: Run) -> Section:
    """Error against rank, as a figure and a table."""
    found = read_report(run.directory / DISTORTION_FILE)
    rows = [
        (
            str(one["kind"]),
            count(one["rank"]),
            count(one.get("columns")),
            f"{one['rms']:.4f}",
            f"{one['dense_rms']:.4f}",
            correlation(one.get("spearman")),
            _share(one, "recall_at_1"),
            _share(one, "recall_at_5"),
        )
        for one in found["measurements"]
    ]
    columns = [
        Column("Matrices", "text"),
        Column("Rank"),
        Column("Numbers a sample"),
        Column("Error"),
        Column("of dense ones"),
        Column("Rank correlation"),
        Column("Top 1 kept"),
        Column("Top 5 kept"),
    ]
    caption = "Error of projected inner products against exact ones, over all pairs of the samples"
    return Section("What projections lose", [Picture(draw_distortion(found)), Table(caption, columns, rows)])


def _share(one: Mapping[str, Any], name: str) -> str:
    return percent(one.get(name), 0)
