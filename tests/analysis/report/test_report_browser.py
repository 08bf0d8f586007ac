"""Reports in a real browser, on screens and on paper. Needs Chromium, and Playwright of the `dev` extra."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from analysis.report import write_comparison_report, write_run_report
from analysis.runs import load_run
from tests.analysis.report.test_comparison import COMPARISON
from tests.analysis.report.test_run import COVERAGE, configure

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.slow

WIDTHS = (1280, 400)
LONG = "a-very-long-name-without-any-place-to-break-it/" * 4
A4 = (794, 1123)  # CSS pixels

# What stands out of the page's own box, or of a box that does not scroll.
OVERFLOWING = """() => {
  const page = document.documentElement.clientWidth;
  const clipped = [];
  for (const element of document.querySelectorAll("body *:not(svg *)")) {
    if (element.closest(".scroll") && !element.matches(".scroll")) continue;
    const box = element.getBoundingClientRect();
    const outside = box.width && (box.left < -0.5 || box.right > page + 0.5);
    if (outside) clipped.push(element.outerHTML.slice(0, 90));
  }
  return clipped;
}"""
# What would be cut off on paper, where nothing scrolls.
CUT = """() => {
  const page = document.body.getBoundingClientRect().right;
  return [...document.querySelectorAll("body *:not(svg *)")]
    .filter((element) => element.getBoundingClientRect().right > page + 0.5)
    .map((element) => element.outerHTML.slice(0, 90));
}"""
FIGURES = """() => [...document.querySelectorAll("svg, img")].map((figure) => {
  const { width, height } = figure.getBoundingClientRect();
  return [width, height];
})"""
# Text of a figure that reaches out of it; the box of a line is some pixels higher than its letters.
LOST_LABELS = """() => [...document.querySelectorAll("svg")].flatMap((figure) => {
  const frame = figure.getBoundingClientRect();
  return [...figure.querySelectorAll("text")].filter((label) => {
    const box = label.getBoundingClientRect();
    return box.left < frame.left - 3 || box.right > frame.right + 3 || box.top < frame.top - 3
      || box.bottom > frame.bottom + 3;
  }).map((label) => label.textContent);
})"""
HEADINGS = """() => [...document.querySelectorAll("h1, h2, h3, h4")].map(
  (heading) => [Number(heading.tagName[1]), heading.textContent]
)"""
SCROLLING = """() => [...document.querySelectorAll(".scroll")].map(
  (box) => [box.scrollWidth > box.clientWidth, box.tabIndex]
)"""


@pytest.fixture
def run_report(make_run: Callable[..., Path]) -> Path:
    """Of a run with long names, many columns and everything else that could be too wide."""
    path = make_run(domains=("code", "docs", LONG[:60]), steps=80, heavy=True)
    configure(
        path, engine__resolution="family", model__name=f"gpt2-{LONG}", data__kind="text", data__path=LONG
    )
    (path / "coverage.json").write_text(json.dumps(COVERAGE))
    _write_columns(path)
    (path / ".hydra").mkdir()
    (path / ".hydra" / "overrides.yaml").write_text(f"- data.path={LONG}\n")
    names = [row["sample_id"] for row in _values(path)]
    return write_run_report(load_run(path), path / "report.html", dict.fromkeys(names, f"first words {LONG}"))


@pytest.fixture
def comparison_report(make_aggregate: Callable[..., Path]) -> Path:
    folder = make_aggregate(runs=12, columns=True, steps=8)
    (folder / "comparison.json").write_text(json.dumps(COMPARISON))
    return write_comparison_report(folder, folder / "report.html")


@pytest.fixture(params=["run_report", "comparison_report"])
def report(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


class Visit:
    """A page that was opened, with what it said to the console and what it asked the network for."""

    def __init__(self, browser: "Browser", report: Path, width: int) -> None:
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page: Page = browser.new_page(viewport={"width": width, "height": 900})
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(report.as_uri())

    def found(self, script: str) -> Any:
        """What a script finds in the page."""
        return self.page.evaluate(script)


@pytest.mark.parametrize("width", WIDTHS)
def test_on_a_screen(browser: "Browser", report: Path, width: int) -> None:
    visit = Visit(browser, report, width)
    assert visit.said == []
    assert [url for url in visit.asked if not url.startswith("data:")] == [report.as_uri()]
    assert visit.found("() => document.documentElement.scrollWidth") <= width
    assert visit.found(OVERFLOWING) == []
    sizes = visit.found(FIGURES)
    assert len(sizes) >= 3
    assert all(w > 250 and h > 80 for w, h in sizes)
    assert visit.found(LOST_LABELS) == []


def test_headings_are_in_order_and_the_contents_lead_to_them(browser: "Browser", report: Path) -> None:
    visit = Visit(browser, report, WIDTHS[0])
    levels, titles = zip(*visit.found(HEADINGS), strict=True)
    assert levels[0] == 1
    assert set(levels[1:]) == {2}
    links = visit.found("() => [...document.querySelectorAll('nav a')].map((a) => [a.hash, a.textContent])")
    assert [text for _, text in links] == list(titles[1:])
    for anchor, text in links:
        assert visit.found(f"() => document.querySelector('{anchor} h2').textContent") == text
    assert visit.found("() => document.documentElement.lang") == "en"


def test_boxes_that_scroll_can_be_reached_by_keyboard(browser: "Browser", report: Path) -> None:
    visit = Visit(browser, report, WIDTHS[1])
    boxes = visit.found(SCROLLING)
    assert any(scrolls for scrolls, _ in boxes)
    assert all(index == 0 for _, index in boxes)


def test_it_reads_without_scripts(browser: "Browser", report: Path) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(report.as_uri())
    assert "What this does not say" in page.content()
    context.close()


def test_on_paper(browser: "Browser", report: Path) -> None:
    visit = Visit(browser, report, A4[0] - 114)  # less the margins, of 15 mm each
    titles = [text for level, text in visit.found(HEADINGS) if level == 2]
    visit.page.emulate_media(media="print")
    assert visit.found(CUT) == []
    assert all(w > 150 and 80 < h < A4[1] for w, h in visit.found(FIGURES))
    assert not visit.found("() => document.querySelector('nav').checkVisibility()")
    pdf = visit.page.pdf(prefer_css_page_size=True, print_background=True, tagged=True, outline=True)
    assert set(titles) <= _outline(pdf)
    sizes = _page_sizes(pdf)
    assert len(sizes) >= 2
    assert all(abs(w - 595) < 2 and abs(h - 842) < 2 for w, h in sizes)  # A4 in points


def _outline(pdf: bytes) -> set[str]:
    """Titles of the bookmarks that Chromium makes of headings."""
    return {title.decode() for title in re.findall(rb"/Title \(([^)]*)\)", pdf)}


def _page_sizes(pdf: bytes) -> list[tuple[float, float]]:
    """Width and height of every page, in points."""
    boxes = re.findall(rb"/MediaBox \[0 0 ([\d.]+) ([\d.]+)\]", pdf)
    return [(float(width), float(height)) for width, height in boxes]


def _values(path: Path) -> list[dict]:
    import pyarrow.parquet as pq

    return pq.read_table(path / "values.parquet").to_pylist()


def _write_columns(path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = _values(path)
    columns = {name: [row[name] for row in rows] for name in ("sample_id", "domain")}
    parts = {f"family{i}-{LONG[:40]}": [row["value"] / 30 for row in rows] for i in range(30)}
    pq.write_table(pa.table(columns | parts), path / "values_by_column.parquet")
