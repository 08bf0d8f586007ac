"""MLflow's pages of real runs, served by the command that the runs print, in a real browser.

The pictures of docs/browsing.md:  python -m pytest -n0 tests/browser --pictures docs/pictures
"""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest
from PIL import Image

from tests.mlflow_server import ROOT, Server, free_port

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

pytestmark = pytest.mark.slow

SIZE = {"width": 1440, "height": 800}
COLOURS = 128  # of a picture: a quarter of the bytes, and nothing to be seen of it
LARGEST = 150_000  # bytes
PATIENCE = 60_000.0  # milliseconds; pages wait for a server on a busy machine

TRAIN = [sys.executable, str(ROOT / "run.py"), "experiment=guide", "trainer.max_steps=120"]
SWEEP = [
    *(sys.executable, str(ROOT / "run.py"), "-m", "experiment=guide", "trainer.max_steps=40"),
    *("trainer.warmup_steps=4", "seed=1,2,3"),
]


@dataclass(frozen=True)
class Served:
    """Runs and where their pages are.

    Attributes:
        train_url: The page of a single run, as the run printed it.
        sweep_url: The page of a sweep's parent.
    """

    server: Server
    train_url: str
    sweep_url: str

    @property
    def experiment_url(self) -> str:
        """The table of runs."""
        return re.sub(r"/runs/[0-9a-f]+", "/runs", self.train_url)


def run(command: list[str], cwd: Path) -> tuple[str, str]:
    """Run a command of ours; what it says to open MLflow with, and the address of its page."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = dict(re.findall(r"^(Open MLflow|This run's page) +(.*)$", done.stdout, re.MULTILINE))
    return said["Open MLflow"], said["This run's page"]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    cwd = tmp_path_factory.mktemp("runs")
    command, train_url = run(TRAIN, cwd)
    same, sweep_url = run(SWEEP, cwd)
    assert same == command
    port = free_port()
    server = Server(command.replace("--port 5000", f"--port {port}"), port, cwd / "ui.log")
    server.start()
    try:
        yield Served(server, *(url.replace(":5000/", f":{port}/") for url in (train_url, sweep_url)))
    finally:
        server.kill()


class Visit:
    """A page of the served runs, with all that it asked for."""

    def __init__(self, browser: "Browser", url: str) -> None:
        self.asked: list[str] = []
        self.page: Page = browser.new_page(viewport=SIZE)
        self.page.set_default_timeout(PATIENCE)
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(url)
        # MLflow's assistant takes a quarter of the window the first time.
        self.page.locator("[data-assistant-ui] button[aria-label=Close]").first.click()

    def row(self, name: str) -> "Locator":
        """The row of the table with a run of this name."""
        return self.page.locator(".ag-row").filter(has=self.page.get_by_role("link", name=name))


@pytest.fixture
def pictures(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Where pictures go."""
    folder = request.config.getoption("--pictures") or tmp_path
    folder.mkdir(exist_ok=True)
    return Path(folder)


def picture(page: "Page", path: Path) -> None:
    """Keep what is seen, in few bytes."""
    page.screenshot(path=path, animations="disabled")
    with Image.open(path) as image:
        image.convert("RGB").quantize(COLOURS).save(path, optimize=True)
    assert path.stat().st_size < LARGEST


def test_the_command_serves_this_machine_alone_with_few_processes(served: Served) -> None:
    assert served.server.process is not None
    shell = psutil.Process(served.server.process.pid)
    family = [shell, *shell.children(recursive=True)]
    pythons = [one for one in family if "python" in one.name() or "mlflow" in " ".join(one.cmdline()[:2])]
    assert len(pythons) <= 2, [shlex.join(one.cmdline()) for one in family]
    listening = {
        connection.laddr.ip
        for one in family
        for connection in one.net_connections()
        if connection.status == psutil.CONN_LISTEN
    }
    assert listening == {"127.0.0.1"}


def test_the_table_of_runs(browser: "Browser", served: Served, pictures: Path) -> None:
    visit = Visit(browser, served.experiment_url)
    page = visit.page
    single, parent = visit.row("gpt2-bytes interpreter").last, visit.row("sweep of seed").first
    single.wait_for()
    for column in ("Run Name", "Created", "Dataset", "Duration", "Source"):
        assert header(page, column).is_visible()
    for cell in ("interpreter (", "run.py"):
        assert page.locator(".ag-cell").filter(has_text=cell).first.is_visible()
    change_columns(page, ("Models", "val/loss", "scoring/overhead"))
    assert not visit.row("/0 gpt2-bytes").is_visible()
    parent.locator("button").first.click()
    for child in ("/0 gpt2-bytes", "/1 gpt2-bytes", "/2 gpt2-bytes"):
        visit.row(child).wait_for()
    picture(page, pictures / "mlflow-runs.png")
    assert not [url for url in visit.asked if not url.startswith((served.server.uri, "data:", "blob:"))]


def change_columns(page: "Page", names: tuple[str, ...]) -> None:
    """Show columns that are hidden and hide those that are shown, in the menu for that."""
    page.get_by_test_id("column-selection-dropdown").first.click()
    for name in names:
        shown = header(page, name).count()
        page.get_by_placeholder("Search columns").fill(name)
        page.locator("strong").filter(has_text=re.compile(f"^{name}$")).first.click()  # what the search found
        header(page, name).wait_for(state="detached" if shown else "attached")
    page.keyboard.press("Escape")


def header(page: "Page", column: str) -> "Locator":
    """The heading of a column of the table of runs."""
    return page.locator(".ag-header-cell").filter(has_text=column)


def test_the_page_of_a_run(browser: "Browser", served: Served, pictures: Path) -> None:
    page = Visit(browser, served.train_url).page
    page.get_by_role("heading", name="gpt2-bytes interpreter").wait_for()
    page.get_by_text("What each training sample was worth to the validation loss.").wait_for()
    for metric in ("train/loss", "val/loss", "scores/negative_share", "scoring/overhead"):
        page.get_by_role("link", name=metric).wait_for()
    page.get_by_text("Show more", exact=True).first.click()
    page.get_by_role("columnheader", name="helped most").wait_for()
    picture(page, pictures / "mlflow-run.png")


def test_the_charts_of_a_run(browser: "Browser", served: Served, pictures: Path) -> None:
    page = Visit(browser, served.train_url).page
    page.get_by_text("Model metrics", exact=True).first.click()
    for group in ("memory", "scores", "scoring", "train", "val"):
        page.get_by_text(group, exact=True).first.wait_for()
    for group in ("memory", "scores", "scoring"):  # folded, so that the losses are seen
        page.get_by_text(group, exact=True).first.click()
    page.locator(".js-plotly-plot .scatterlayer .trace").first.wait_for(state="attached")
    page.wait_for_timeout(2000)  # charts are drawn as they come into sight
    picture(page, pictures / "mlflow-charts.png")


def test_the_report_among_the_artifacts(browser: "Browser", served: Served, pictures: Path) -> None:
    url = served.train_url.replace("?", "/artifacts/report.html?")
    page = Visit(browser, url).page
    report = page.frame_locator("iframe")
    report.get_by_role("heading", name="gpt2-bytes on interpreter").wait_for()
    assert report.get_by_text("Samples scored").is_visible()
    picture(page, pictures / "mlflow-report.png")
