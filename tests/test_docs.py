"""What the documentation names is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_every_known_failure_has_its_tests() -> None:
    text = (ROOT / "docs" / "failures.md").read_text(encoding="utf-8")
    named = re.findall(r"`((?:ghost|runners)/[\w/]+\.py)(?:::(\w+))?`", text)
    assert len(named) > 30
    for path, test in named:
        file = ROOT / "tests" / path
        assert file.is_file(), path
        assert f"def {test}" in file.read_text(encoding="utf-8"), f"{path}::{test}"
    rows = [line for line in text.splitlines() if line.startswith("| ")][1:]
    assert all(re.search(r"`(ghost|runners)/", row) for row in rows)


def anchors(page: Path) -> set[str]:
    """What links to the page's headings say behind the `#`, as GitHub makes it."""
    prose = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)", prose, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        if "://" in link:
            continue
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link
