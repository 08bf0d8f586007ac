"""The results sections of the page: between their markers, whatever stands around them."""

import re
from collections.abc import Callable, Sequence
from functools import partial

from analysis.errors import AnalysisError
from analysis.fidelity.differences import differences, leaves_zero_out
from analysis.fidelity.presentations import Presentation
from analysis.fidelity.reading import Found
from analysis.fidelity.summary import SEED, Row, alike, estimate_text, measures

_SECTION = re.compile(r"(<!-- results: (?P<name>\w+) -->\n).*?(<!-- end of results -->)", re.DOTALL)


def sections(text: str) -> list[str]:
    """The experiments that a page has a results section for."""
    return [found["name"] for found in _SECTION.finditer(text)]


def with_section(text: str, experiment: str, lines: Sequence[str]) -> str:
    """The page with another results section for the experiment.

    Raises:
        AnalysisError: It has no markers for it, or several.
    """
    if (number := sections(text).count(experiment)) != 1:
        raise AnalysisError(
            f"the page has {number} places for the results of {experiment}: write the line <!-- results: "
            f"{experiment} --> once, and <!-- end of results --> below it"
        )
    body = "\n".join([*lines, ""])
    return _SECTION.sub(
        lambda found: f"{found[1]}{body}{found[3]}" if found["name"] == experiment else found[0], text
    )


def results(
    experiment: str, found: Found, rows: Sequence[Row], shown: Presentation, figures: Sequence[str]
) -> list[str]:
    """The lines of a results section.

    Args:
        figures: The figures' paths from the page.
    """
    lines = [completeness(found), "", *_tables([row for row in rows if row.method], shown)]
    if places := [row for row in rows if not row.method]:
        lines += ["Of the points themselves:", "", *_tables(places, shown)]
    lines += _differences(rows, shown)
    for figure in figures:
        lines += [f"![{experiment}: means over seeds with 95 % intervals]({figure})", ""]
    return [*lines, f"*{'; '.join(found.machines)}; code: {', '.join(found.commits)}.*"]


def completeness(found: Found) -> str:
    """How much of the plan the numbers are of."""
    seeds = sorted({int(one.coordinates[SEED]) for one in found.measurements})
    there = f"{len(found.measurements)} of {found.planned} points, seeds {', '.join(map(str, seeds))}"
    is_whole = len(found.measurements) == found.planned
    return f"{there}." if is_whole else f"**Unfinished: {there}.**"


def _tables(rows: Sequence[Row], shown: Presentation) -> list[str]:
    """Tables of the rows, parted as `alike` parts them, an empty line behind each."""
    return [line for part in alike(rows) for line in (*table(part, partial(_cell, shown=shown)), "")]


def _differences(rows: Sequence[Row], shown: Presentation) -> list[str]:
    """The table of differences to the reference, an empty line behind it; nothing where there are none."""
    if shown.reference is None:
        return []
    found = differences(rows, shown.reference, shown.compared or shown.drawn)
    if not found:
        return []
    named = ", ".join(f"`{value}`" for value in shown.reference.values())
    intro = f"Difference to {named} at the same place, paired by seed (bold: the interval leaves 0 out):"
    return [intro, "", *table(found, _difference), ""]


def table(rows: Sequence[Row], cell: Callable[[Row, str], str]) -> list[str]:
    """Rows as lines of a Markdown table.

    Args:
        cell: What stands in a row's cell of a measure.
    """
    coordinates = list(rows[0].coordinates)
    with_methods = any(row.method for row in rows)
    columns = measures(rows)
    heading = [
        *coordinates,
        *(["method"] if with_methods else []),
        *(name.replace("_", " ") for name in columns),
    ]
    lines = [heading, ["---"] * len(heading)]
    for row in rows:
        named = [f"`{row.method}`"] if with_methods else []
        lines.append([*row.coordinates.values(), *named, *(cell(row, name) for name in columns)])
    return [f"| {' | '.join(line)} |" for line in lines]


def _cell(row: Row, measure: str, shown: Presentation) -> str:
    estimate = row.estimates.get(measure)
    if estimate is None:
        return ""
    published = [one.figure for one in shown.published if one.is_of(row, measure)]
    return estimate_text(estimate) + "".join(f" (published: {figure})" for figure in published)


def _difference(row: Row, measure: str) -> str:
    estimate = row.estimates.get(measure)
    if estimate is None:
        return ""
    text = estimate_text(estimate)
    return f"**{text}**" if leaves_zero_out(estimate) else text
