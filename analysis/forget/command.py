"""Deletes samples, by their ids, from everything that runs leave: stores, scores, tables, lists, figures.

python -m analysis.forget paths=outputs "ids=['mail/17#0']" compact=true
"""
# ruff: noqa: RUF009 -- `key` returns dataclass fields, not shared values

import logging
from collections.abc import Callable, Sequence, Set
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig

from analysis.errors import AnalysisError
from analysis.forget.artefact import Artefact
from analysis.forget.finding import find_artefacts, find_pages
from analysis.forget.stores import Store
from analysis.forget.tracked import tracked_runs
from analysis.forget.verification import Finding, has_an_id, verify_gone
from analysis.report import write_run_report
from analysis.runs import CONFIG_FILE, load_run
from analysis.tracking_store import resolve_uri
from conf.command import FAILED, Reported, run_command
from conf.errors import ConfigError, UserError
from conf.refuse import refuse
from conf.schema import TrackingStore, key, several
from ghost import GhostError

log = logging.getLogger(__name__)


@dataclass
class ForgetConfig:
    """The whole tree of this command."""

    paths: Any = key("PATH or [PATH,PATH]: run directories, stores, folders of those, lists of samples")
    runs: Any = key("ID or [ID,ID]: runs in MLflow, whose and whose children's artifacts are cleaned")
    ids: Any = key("ID or [ID,ID]: the samples, as in the column sample_id")
    compact: bool = key("rewrite stores, so that no byte remains, and verify that all is gone")
    tracking: TrackingStore = MISSING


ConfigStore.instance().store(name="schema_forget", node=ForgetConfig, provider="ghostrunner")


def forget(paths: Sequence[Path], ids: Set[str]) -> None:
    """Delete samples from everything at and below the paths; stores keep the rows' bytes until `compact`.

    A call that was killed can be repeated: what is gone already is passed over.

    Raises:
        AnalysisError: A path is not there, or a file is damaged or cannot be written.
        StoreError: A store cannot be changed.
    """
    artefacts = find_artefacts(paths)
    names = [artefact.names() for artefact in artefacts]
    concerned = [artefact for artefact, own in zip(artefacts, names, strict=True) if own & ids]
    for store in concerned:
        if isinstance(store, Store):
            store.refuse_unfinished()
    say_unknown(ids, set().union(*names))
    removed = remove_pages(find_pages(paths), concerned, ids)
    for artefact in artefacts:
        artefact.forget(ids)
        if artefact in concerned:
            log.info("Deleted from %s", artefact.path)
    for page in removed:
        report_again(page)


def remove_pages(pages: Sequence[Path], concerned: Sequence[Artefact], ids: Set[str]) -> list[Path]:
    """Delete the reports that may show the samples, also cut short or in figures: those that have an id, and
    those in a folder at or above something that named one. Returns which.
    """
    below = [artefact.path.resolve() for artefact in concerned]
    removed = [
        page
        for page in pages
        if any(path.is_relative_to(page.parent) for path in below) or has_an_id(page, ids)
    ]
    for page in removed:
        page.unlink()
        log.info("%s is deleted, since it may show the samples.", page)
    return removed


def report_again(page: Path) -> None:
    """Write the report of the run that the page is beside, from what is left; nothing beside others."""
    if not (page.parent / CONFIG_FILE).is_file():
        return
    try:
        write_run_report(load_run(page.parent), page, None)
    except AnalysisError as error:
        log.error("The report could not be written again: %s", error)
        return
    log.info("%s is written again, without words of samples.", page)


def compact(paths: Sequence[Path]) -> None:
    """Rewrite the stores at and below the paths without deleted samples.

    Raises:
        AnalysisError, StoreError: As `forget`.
    """
    for store in stores_in(find_artefacts(paths)):
        store.compact()
        log.info("%s is rewritten: nothing of deleted samples is left in it.", store.path)


def stores_in(artefacts: Sequence[Artefact]) -> list[Store]:
    """Those that are stores."""
    return [artefact for artefact in artefacts if isinstance(artefact, Store)]


def say_unknown(ids: Set[str], known: Set[str]) -> None:
    """Warn of ids that nothing names: typed wrongly, or gone already."""
    for name in sorted(ids - known):
        close = get_close_matches(name, known, n=1, cutoff=0.8)
        hint = f" (did you mean {close[0]}?)" if close else ""
        log.warning("Nothing names %s%s: it is no sample of these, or deleted already.", name, hint)


def run(cfg: DictConfig) -> list[Finding]:
    """Delete as configured; returns what is left, which is only looked for with `compact=true`.

    Raises:
        ConfigError, AnalysisError, StoreError: Something cannot be found, read or written.
    """
    check(cfg)
    ids = frozenset(several(cfg.ids))
    paths = [Path(path) for path in several(cfg.paths)]
    uri = resolve_uri(cfg.tracking.uri, Path.cwd())
    tracked = tracked_runs([run_id.removeprefix("runs:/") for run_id in several(cfg.runs)], uri)
    with ExitStack() as stack:
        folders = [*paths, *_entered(stack, [one.changed_artifacts for one in tracked])]
        forget(folders, ids)
        if cfg.compact:
            compact(folders)
        elif stores_in(find_artefacts(folders)):
            log.info("Stores have the samples' rows in their files until compact=true rewrites these.")
    if not cfg.compact:
        return []
    with ExitStack() as stack:
        folders = [*paths, *_entered(stack, [one.artifacts for one in tracked])]
        found = verify_gone(folders, ids)
    return found + [finding for one in tracked for finding in one.fields_left(ids)]


def check(cfg: DictConfig) -> None:
    """Raises `ConfigError` for a config that says nothing to do."""
    if not several(cfg.paths) and not several(cfg.runs):
        raise ConfigError("nothing is named to delete from: type paths=PATH, or runs=ID")
    if not several(cfg.ids) and not cfg.compact:
        raise ConfigError("no sample is named: type \"ids=['ID']\", or compact=true to rewrite stores")
    if cfg.tracking.uri is not None and not several(cfg.runs):
        refuse(cfg, "tracking.uri", "has no effect without runs: type tracking.uri=null, or runs=ID")


def say(found: Sequence[Finding], ids: Sequence[str]) -> None:
    """Report what is left."""
    for finding in found:
        log.error("%s %s", finding.path, finding.why)
    if not found:
        log.info("Verified: nothing that was searched names %s.", ", ".join(ids) or "a deleted sample")


def _entered(stack: ExitStack, scopes: Sequence[Callable[[], AbstractContextManager[Path]]]) -> list[Path]:
    return [stack.enter_context(scope()) for scope in scopes]


def task(cfg: DictConfig) -> None:
    """Hydra's task function: one deletion. Ends with exit code 1 where something is left."""
    with Reported(UserError, GhostError):
        found = run(cfg)
        if cfg.compact:
            say(found, several(cfg.ids))
        if found:
            raise SystemExit(FAILED)


def main() -> int:
    """Runs the command line in `sys.argv` and returns the exit code."""
    return run_command("forget", task, groups=())
