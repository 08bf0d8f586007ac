"""`python -m analysis.fidelity`: what MLflow has, in its place on the page, and nothing else touched."""

import shutil
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree

import pytest

from analysis.errors import AnalysisError
from analysis.fidelity import reading
from analysis.fidelity.command import main
from analysis.fidelity.figure import draw_course
from analysis.fidelity.page import sections, with_section
from analysis.fidelity.presentations import PRESENTATIONS, Course, Published
from analysis.fidelity.reading import read_points
from analysis.fidelity.summary import Row
from conf.command import MISTAKE
from tests.analysis.command_line import Command

if TYPE_CHECKING:
    pass

PAGE = """# Title

Before.

<!-- results: one_step -->
Not measured yet.
<!-- end of results -->

Between.

<!-- results: lds -->
Not measured yet.
<!-- end of results -->

After.
"""
EXPERIMENT = "ghostrunner-fidelity"


class Store:
    """An MLflow store, and points in it."""

    def __init__(self, folder: Path) -> None:
        from mlflow.tracking import MlflowClient

        self.client: MlflowClient = MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")
        self.experiment = self.client.create_experiment(EXPERIMENT)
        self._clock = count(1)

    def add(
        self, name: str, coordinates: Mapping[str, object], metrics: Mapping[str, float], *, planned: int = 4,
        settings: str = "aaa", committed: bool = True, status: str = "FINISHED",
        commit: str = "0123456789", dirty: bool = False,
        course: Mapping[int, Mapping[str, float]] | None = None,
    ) -> None:  # fmt: skip
        tags = {
            "fidelity.experiment": name, "fidelity.point": "-".join(map(str, coordinates.values())),
            "fidelity.settings": settings, "fidelity.planned": str(planned),
            "fidelity.committed": str(committed).lower(), "fidelity.coordinates": ",".join(coordinates),
            "device": "a processor", "version.torch": "2.13", "git.commit": commit,
            "git.dirty": str(dirty).lower(),
        }  # fmt: skip
        run = self.client.create_run(self.experiment, start_time=next(self._clock), tags=tags).info.run_id
        for key, value in coordinates.items():
            self.client.log_param(run, f"point.{key}", str(value))
        for key, number in metrics.items():
            self.client.log_metric(run, key, number)
        for step, numbers in (course or {}).items():
            for key, number in numbers.items():
                self.client.log_metric(run, f"course/{key}", number, step=step)
        self.client.set_terminated(run, status)


@pytest.fixture
def store(tmp_path: Path, ready_store: Path, in_process: Command, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setattr(reading, "planned_seeds", lambda name: [0, 1, 2, 3, 4])
    shutil.copy(ready_store, tmp_path / "mlflow.db")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "fidelity.md").write_text(PAGE, encoding="utf-8")
    return Store(tmp_path)


def page() -> str:
    return Path("docs/fidelity.md").read_text(encoding="utf-8")


def add_steps(store: Store, seeds: int, **settings: object) -> None:
    for seed in range(seeds):
        for lr in (0.0006, 0.005):
            metrics = {"spearman/first_order": 0.9 + seed / 100, "rmse/first_order": 1e-4, "spread": 0.01}
            store.add("one_step", {"optimizer": "sgd", "lr": lr, "seed": seed}, metrics, **settings)  # type: ignore[arg-type]


def test_results_stand_between_their_markers(store: Store, in_process: Command) -> None:
    add_steps(store, 2)
    assert in_process(main) == 0
    text = page()
    assert "4 of 4 points, seeds 0, 1." in text
    assert "| optimizer | lr | method | rmse | spearman |" in text
    assert "| sgd | 0.0006 | `first_order` | 0.0001 ± 0 | 0.905 ± 0.064 (published: 0.99) |" in text
    assert "| sgd | 0.005 | `first_order` | 0.0001 ± 0 | 0.905 ± 0.064 (published: 0.79) |" in text
    assert "*a processor, torch 2.13; code: 0123456.*" in text
    assert "![one_step: means over seeds with 95 % intervals](fidelity/one_step.svg)" in text
    assert text.startswith("# Title\n\nBefore.\n\n<!-- results: one_step -->\n")
    assert text.endswith(
        "Between.\n\n<!-- results: lds -->\nNot measured yet.\n<!-- end of results -->\n\nAfter.\n"
    )
    drawn = Path("docs/fidelity/one_step.svg").read_bytes()
    ElementTree.fromstring(drawn)
    assert in_process(main) == 0
    assert (page(), Path("docs/fidelity/one_step.svg").read_bytes()) == (text, drawn)


def test_an_unfinished_experiment_is_said_to_be(
    store: Store, in_process: Command, capfd: pytest.CaptureFixture[str]
) -> None:
    add_steps(store, 2, planned=10)
    store.add("one_step", {"optimizer": "sgd", "lr": 0.3, "seed": 0}, {"spread": 1.0}, status="KILLED")
    assert in_process(main) == 0
    assert "**Unfinished: 4 of 10 points, seeds 0, 1.**" in page()
    said = capfd.readouterr().err
    assert "WARNING one_step: **Unfinished: 4 of 10 points" in said
    assert "WARNING lds: no finished point" in said


def test_other_sizes_are_left_out_and_a_points_newest_run_counts(
    store: Store, in_process: Command, tmp_path: Path
) -> None:
    place = {"seed": 0}
    store.add("lds", place, {"lds/a": 0.1}, settings="old", planned=2)
    store.add("lds", place, {"lds/a": 0.2}, planned=1)
    store.add("lds", place, {"lds/a": 0.3}, planned=1)
    store.add("lds", place, {"lds/a": 0.4}, settings="tiny", committed=False)
    found = read_points(None, EXPERIMENT, tmp_path)["lds"]
    assert [one.metrics["lds/a"] for one in found.measurements] == [0.3]
    assert (found.planned, found.left_out) == (1, 2)


def test_points_of_other_seeds_than_the_files_are_left_out(
    store: Store, in_process: Command, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for seed in (0, 4, 5, 11):
        store.add("lds", {"seed": seed}, {"lds/a": 0.1 * seed}, planned=5)
    found = read_points(None, EXPERIMENT, tmp_path)["lds"]
    assert [one.coordinates["seed"] for one in found.measurements] == ["0", "4"]
    assert (found.planned, found.left_out) == (5, 2)
    assert in_process(main) == 0
    assert "**Unfinished: 2 of 5 points, seeds 0, 4.**" in page()
    assert "WARNING lds: 2 points of other sizes or seeds are left out" in capfd.readouterr().err


def test_points_of_other_seeds_alone_leave_the_page(store: Store, in_process: Command) -> None:
    store.add("lds", {"seed": 7}, {"lds/a": 0.4})
    store.add("no_such_experiment", {"seed": 0}, {"lds/a": 0.4})
    assert in_process(main) == 0
    assert page() == PAGE


def test_every_state_of_the_code_is_named(
    store: Store, in_process: Command, capfd: pytest.CaptureFixture[str]
) -> None:
    add_steps(store, 1, commit="aaaaaaaaaa")
    store.add(
        "one_step",
        {"optimizer": "sgd", "lr": 3.0, "seed": 1},
        {"spread": 1.0},
        commit="bbbbbbbbbb",
        dirty=True,
    )
    assert in_process(main) == 0
    assert "torch 2.13; code: aaaaaaa, bbbbbbb (from a changed working tree).*" in page()
    said = capfd.readouterr().err
    assert "WARNING one_step: its points are of several states of the code: aaaaaaa, bbbbbbb (from" in said


def test_differences_to_the_reference_are_paired_by_seed(store: Store, in_process: Command) -> None:
    """Rows whose own intervals overlap by far differ by the same each time."""
    for seed, level in enumerate((0.2, 0.5, 0.8)):
        metrics = {
            "lds/first_order": level, "lds/b": level + 0.05 + 0.01 * seed, "lds/random": -level,
            "lds_of_mean/first_order": level, "lds_of_mean/b": level,
        }  # fmt: skip
        store.add("lds", {"seed": seed}, metrics, planned=5)
    assert in_process(main) == 0
    text = page()
    assert "Difference to `first_order` at the same place, paired by seed" in text
    assert "| `b` | **0.060 ± 0.025** | 0 ± 0 |" in text  # Student's 4.303 · 0.01 / √3
    assert "| `random` | -1.000 ± 1.490 |  |" in text


def test_policies_are_held_against_uniform(store: Store, in_process: Command, tmp_path: Path) -> None:
    path = tmp_path / "docs" / "fidelity.md"
    path.write_text("<!-- results: selection -->\n<!-- end of results -->\n", encoding="utf-8")
    for seed in range(2):
        course = {0: {"test_loss": 5.0, "rows": 0.0, "seconds": 0.0}}
        for policy, less in (("uniform", 0.0), ("top_k", 0.5)):
            metrics = {"test_loss": 3.0 + seed - less, "loss_at_budget": 3.0 - less, "kept_share": 0.5}
            store.add("selection", {"policy": policy, "seed": seed}, metrics, course=course)
    assert in_process(main) == 0
    (_, differences) = page().split("Difference to `uniform` at the same place")
    assert "| policy | test loss | loss at budget |" in differences
    assert "| top_k | **-0.5 ± 0** | **-0.5 ± 0** |" in differences
    assert "| uniform |" not in differences


def test_rows_with_other_measures_have_a_table_of_their_own(store: Store, in_process: Command) -> None:
    metrics = {"lds/first_order": 0.3, "for_code/first_order: code samples": 1.0, "lds/random": 0.0}
    store.add("lds", {"seed": 0}, {**metrics, "spread": 2.0}, planned=5)
    assert in_process(main) == 0
    (methods, _) = page().split("Of the points themselves:")
    (first, second) = methods.split("| method | lds |")
    assert "| method | for code |\n| --- | --- |\n| `first_order: code samples` | 1 |\n\n" in first
    assert second.startswith("\n| --- | --- |\n| `first_order` | 0.3 |\n| `random` | 0 |\n\n")


def test_without_points_at_committed_sizes_the_page_stays(store: Store, in_process: Command) -> None:
    store.add("lds", {"seed": 0}, {"lds/a": 0.4}, committed=False)
    assert in_process(main) == 0
    assert page() == PAGE


def test_methods_of_one_place_are_drawn_beside_each_other(store: Store, in_process: Command) -> None:
    for seed in range(3):
        metrics = {
            f"{measure}/{name}": 0.1 * seed for measure in ("lds", "lds_of_mean") for name in ("a", "b_c")
        }
        store.add("lds", {"seed": seed}, metrics, planned=3)
    assert in_process(main) == 0
    assert "| `b_c` | 0.100 ± 0.248 | 0.100 ± 0.248 |" in page()
    drawn = Path("docs/fidelity/lds.svg").read_text(encoding="utf-8")
    assert "lds of mean" in drawn


def test_courses_are_drawn_and_are_no_results(store: Store, in_process: Command, tmp_path: Path) -> None:
    path = tmp_path / "docs" / "fidelity.md"
    path.write_text("<!-- results: selection -->\n<!-- end of results -->\n", encoding="utf-8")
    for seed in range(2):
        for policy in ("top_k", "uniform"):
            course = {
                step: {"test_loss": 5.0 - step + seed / 10, "rows": 8.0 * step, "seconds": 0.1 * step + seed}
                for step in range(3 + seed)  # one seed goes on for longer
            }
            store.add("selection", {"policy": policy, "seed": seed}, {"test_loss": 3.0}, course=course)
    assert in_process(main) == 0
    assert "| policy | test loss |" in page()
    assert "![selection: means over seeds with 95 % intervals](fidelity/selection_course.svg)" in page()
    drawn = Path("docs/fidelity/selection_course.svg").read_text(encoding="utf-8")
    assert all(word in drawn for word in ("top_k", "uniform", "step", "rows", "seconds", "test loss"))
    found = read_points(None, EXPERIMENT, tmp_path)["selection"].measurements
    assert found[0].metrics == {"test_loss": 3.0}
    assert found[0].course["test_loss"] == {0: 5.0, 1: 4.0, 2: 3.0}
    (panel, *_) = draw_course(found, Course("test_loss", ("step", "seconds"))).axes
    for line in panel.lines:
        assert line.get_xydata().tolist() == [[0.0, 5.05], [1.0, 4.05], [2.0, 3.05]]


def test_a_store_without_the_experiment_is_named(
    tmp_path: Path, ready_store: Path, in_process: Command, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(ready_store, tmp_path / "mlflow.db")
    Path("page.md").write_text(PAGE, encoding="utf-8")
    assert in_process(main, "pages=[page.md]") == MISTAKE
    assert f"experiment={EXPERIMENT} is not in" in capfd.readouterr().err
    assert in_process(main, "pages=[none.md]") == MISTAKE
    assert "pages=none.md cannot be read" in capfd.readouterr().err
    assert in_process(main, "pages=[]") == MISTAKE
    assert "pages=[] names no page" in capfd.readouterr().err


def test_a_page_without_markers_is_refused() -> None:
    assert sections(PAGE) == ["one_step", "lds"]
    with pytest.raises(AnalysisError, match="0 places for the results of text"):
        with_section(PAGE, "text", ["x"])
    with pytest.raises(AnalysisError, match="2 places"):
        with_section(PAGE + PAGE, "lds", ["x"])


def test_what_is_written_is_written_as_it_stands() -> None:
    """Backslashes and group references are text."""
    text = with_section(PAGE, "lds", [r"\1 \g<0>"])
    assert "<!-- results: lds -->\n\\1 \\g<0>\n<!-- end of results -->" in text


def test_published_figures_stand_beside_their_own_cells() -> None:
    published = Published("0.79", "spearman", ("first_order",), {"lr": "0.005"})
    row = Row({"optimizer": "sgd", "lr": "0.005"}, "first_order", {}, 5)
    assert published.is_of(row, "spearman")
    assert not published.is_of(row, "rmse")
    assert not published.is_of(Row({"lr": "0.005"}, "random", {}, 5), "spearman")
    assert not published.is_of(Row({"lr": "0.3"}, "first_order", {}, 5), "spearman")


def test_the_pages_own_sections_have_presentations() -> None:
    text = (Path(__file__).resolve().parents[3] / "docs" / "fidelity.md").read_text(encoding="utf-8")
    assert set(sections(text)) <= set(PRESENTATIONS)
    assert {"one_step", "lds"} <= set(sections(text))
