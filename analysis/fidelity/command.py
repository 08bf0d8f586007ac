"""Writes the results of the experiments about values into their page.

python -m analysis.fidelity
"""
# ruff: noqa: RUF009 -- `key` returns dataclass fields, not shared values

import logging
from dataclasses import dataclass
from pathlib import Path

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig

from analysis.errors import AnalysisError
from analysis.fidelity.figure import draw, draw_course, save_svg
from analysis.fidelity.page import completeness, results, sections, with_section
from analysis.fidelity.presentations import PRESENTATIONS
from analysis.fidelity.reading import Found, read_points
from analysis.fidelity.summary import summarise
from conf.command import Reported, run_command
from conf.errors import UserError, first_line
from conf.refuse import refuse
from conf.schema import TrackingStore, key, schema_node
from ghost.atomic import written_beside

log = logging.getLogger(__name__)


@dataclass
class FidelityPageConfig:
    """The whole tree of this command."""

    pages: list[str] = key("files with results sections; figures go into a folder beside each, of its name")
    experiment: str = key("MLflow experiment with the runs of runners.fidelity")
    tracking: TrackingStore = MISSING


ConfigStore.instance().store(
    name="schema_fidelity_page", node=schema_node(FidelityPageConfig), provider="ghostrunner"
)


def run(cfg: DictConfig) -> list[str]:
    """Write what MLflow has into the pages; the experiments that were written.

    Raises:
        ConfigError, AnalysisError: The store or a page cannot be read, or a page has no section to write.
    """
    if not cfg.pages:
        refuse(cfg, "pages", "names no page: type pages=[docs/fidelity.md]")
    texts = {Path(page): _read(Path(page)) for page in cfg.pages}
    found = read_points(cfg.tracking.uri, cfg.experiment, Path.cwd())
    written = []
    for path, text in texts.items():
        for name in sections(text):
            if name not in found:
                log.warning("%s: no finished point at committed sizes and seeds, so its section stays", name)
                continue
            text = with_section(text, name, _lines(name, found[name], path))
            written.append(name)
        with written_beside(path) as partial:
            partial.write_text(text, encoding="utf-8")
        log.info("Wrote %s", path)
    if homeless := sorted(set(found) - set(written)):
        log.warning("%s: measured, and no page has a results section for it", ", ".join(homeless))
    return written


def _lines(name: str, found: Found, page: Path) -> list[str]:
    """The section's lines; its figures are drawn on the way."""
    if name not in PRESENTATIONS:
        raise AnalysisError(f"{name} has no entry in analysis/fidelity/presentations.py: add one")
    shown, rows = PRESENTATIONS[name], summarise(found.measurements)
    say = log.info if len(found.measurements) == found.planned else log.warning
    say("%s: %s", name, completeness(found))
    if found.left_out:
        log.warning("%s: %d points of other sizes or seeds are left out", name, found.left_out)
    if len(found.commits) > 1:
        log.warning("%s: its points are of several states of the code: %s", name, ", ".join(found.commits))
    figures = []
    if shown.drawn:
        figures.append(save_svg(draw(rows, shown.drawn), page.with_suffix("") / f"{name}.svg"))
    if shown.course:
        figure = draw_course(found.measurements, shown.course)
        figures.append(save_svg(figure, page.with_suffix("") / f"{name}_course.svg"))
    return results(name, found, rows, shown, [f"{page.stem}/{figure.name}" for figure in figures])


def _read(page: Path) -> str:
    try:
        return page.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise AnalysisError(
            f"pages={page} cannot be read ({first_line(error)}): name a page of yours"
        ) from error


def task(cfg: DictConfig) -> None:
    """Hydra's task function: the pages."""
    with Reported(UserError):
        run(cfg)


def main() -> int:
    """Runs the command line in `sys.argv` and returns the exit code."""
    return run_command("fidelity_page", task, groups=())
