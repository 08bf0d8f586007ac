"""The report of one run: what it says, what it must not hold, and what it makes of a run that lacks files."""

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from analysis.errors import AnalysisError
from analysis.report import shown_samples, write_run_report
from analysis.runs import load_run
from ghost.store import ProjectionStore
from tests.ghost.store.building import built

MakeRun = Callable[..., Path]

COVERAGE = {
    "parameters": 1000,
    "scored_parameters": 900,
    "scored_parameter_share": 0.9,
    "scored_val_grad_share": 0.95,
    "layers": [],
    "families": {
        "attn": {"parameter_share": 0.4, "scored_parameter_share": 0.4, "val_grad_share": 0.5,
                 "scored_val_grad_share": 0.5},
        "head": {"parameter_share": 0.6, "scored_parameter_share": 0.5, "val_grad_share": 0.5,
                 "scored_val_grad_share": 0.45},
    },
    "gaps": [{"name": "lm_head", "layers": 1, "parameter_share": 0.1, "val_grad_share": 0.05}],
    "unscored_parameters": ["stray"],
}  # fmt: skip
TITLES = [
    "Samples that stand out", "Domains", "How values are spread", "Losses", "Coverage", "Cost of scoring",
    "What the numbers mean", "What this does not say", "Run it again",
]  # fmt: skip


class Outline(HTMLParser):
    """Headings, text, ids and what a page would load, as a browser sees them."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.texts: list[str] = []
        self.headings: list[tuple[str, str]] = []
        self._open: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "xlink:href", "srcset", "data", "action"):
                self.references.append(value or "")

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] in ("h1", "h2", "h3"):
            self.headings.append((self._open[-1], data))
        if not self._open or self._open[-1] != "style":
            self.texts.append(data)

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    @property
    def text(self) -> str:
        """All text, with single spaces."""
        return " ".join(" ".join(self.texts).split())

    @property
    def titles(self) -> list[str]:
        """The sections' headings."""
        return [text for tag, text in self.headings if tag == "h2"]


@pytest.fixture
def run(make_run: MakeRun) -> Path:
    """A run that has everything."""
    path = make_run()
    (path / "coverage.json").write_text(json.dumps(COVERAGE))
    with (path / "metrics.jsonl").open("a") as file:
        for step, share in ((3, 0.04), (6, 0.06), (12, 0.05)):
            line = {"step": step, "time": 0.0, "scoring/overhead": share, "train/tokens_per_second": 700.0}
            file.write(json.dumps(line | {"memory/peak_gb": 1.25}) + "\n")
    environment = {
        "started": "2026-01-02 03:04:05+00:00", "git.commit": "abcdef0123456789", "git.dirty": "false",
        "device": "a processor, 2 cores", "version.torch": "2.13.0", "data.fingerprint": "f" * 64,
        "mlflow.run_id": "0123456789abcdef0123456789abcdef",
    }  # fmt: skip
    (path / "environment.json").write_text(json.dumps(environment))
    (path / ".hydra").mkdir()
    (path / ".hydra" / "overrides.yaml").write_text("- model=gpt2-tiny\n- data.path='my files'\n")
    return path


def report(path: Path, previews: dict[str, str] | None = None) -> Outline:
    return Outline(write_run_report(load_run(path), path / "report.html", previews))


def configure(path: Path, **changes: object) -> None:
    """Change keys of a run's config, as dotted names with `__` for the dots."""
    config = yaml.safe_load((path / "config.yaml").read_text())
    for name, value in changes.items():
        *groups, last = name.split("__")
        node = config
        for group in groups:
            node = node.setdefault(group, {})
        node[last] = value
    (path / "config.yaml").write_text(yaml.safe_dump(config))


def replace_values(path: Path, **columns: object) -> None:
    table = pq.read_table(path / "values.parquet")
    for name, values in columns.items():
        table = table.set_column(table.column_names.index(name), name, pa.array(values))
    pq.write_table(table, path / "values.parquet")


def test_a_whole_run_has_every_section_and_lacks_nothing(run: Path) -> None:
    configure(
        run, model__name="gpt2-tiny", data__kind="interpreter", data__val_samples=30, trainer__max_steps=12
    )
    found = report(run)
    assert found.titles == TITLES
    assert [tag for tag, _ in found.headings].count("h1") == 1
    for said in (
        "gpt2-tiny on interpreter", "graddotprod", "adamw, learning rate 1e-05", "a processor, 2 cores",
        "commit abcdef012345", "2026-01-02 03:04:05", "0123456789abcdef0123456789abcdef",
        "30 validation samples", "90.0 %", "95.0 %", "lm_head", "stray", "5.0 %", "700",
        "1.25 GB", "first-order SGD proxy",
        "python run.py model=gpt2-tiny 'data.path='\"'\"'my files'\"'\"''", "2.13.0",
    ):  # fmt: skip
        assert said in found.text, said
    assert "step 12 of" not in found.text


def test_a_test_set_is_told_from_what_values_are_against(run: Path) -> None:
    configure(
        run, data__kind="interpreter", data__val_samples=30, data__test_samples=12, engine__val_sets="domain"
    )
    with (run / "metrics.jsonl").open("a") as file:
        for step, number in ((0, 3.5), (12, 3.25)):
            file.write(json.dumps({"step": step, "time": 0.0, "test/loss": number}) + "\n")
    found = report(run).text
    for said in (
        "30 samples held out, 12 of them as a test set", "Values are against 18 validation samples",
        "Test loss 3.5000 → 3.2500", "Training, validation and test loss",
        "Each validation set is an objective of its own, and values are of their sum.",
    ):  # fmt: skip
        assert said in found, said


def test_the_numbers_are_the_runs(run: Path) -> None:
    values = pq.read_table(run / "values.parquet").to_pylist()
    found = report(run).text
    negative = sum(row["value"] < 0 for row in values) / len(values)
    assert f"Samples scored {len(values)} " in found
    assert f"Negative values {100 * negative:.1f} %" in found
    top = max(row["value"] for row in values)
    assert 1e-3 <= top < 1e-2  # else the next line speaks of another power of ten
    assert f"+{1e3 * top:.3f}" in found


def test_the_samples_named_are_the_highest_and_the_lowest(run: Path) -> None:
    values = sorted(pq.read_table(run / "values.parquet").to_pylist(), key=lambda row: -row["value"])
    named = shown_samples(load_run(run))
    assert named[:12] == [row["sample_id"] for row in values[:12]]
    assert named[12:] == [row["sample_id"] for row in values[:-13:-1]]
    text = report(run).text
    assert all(name in text for name in named)
    assert values[20]["sample_id"] not in text


def test_few_samples_are_named_once(make_run: MakeRun) -> None:
    path = make_run(steps=1, batch=3, samples=3)
    assert len(set(shown_samples(load_run(path)))) == len(shown_samples(load_run(path))) == 3


def test_nothing_is_loaded_and_no_id_is_there_twice(run: Path) -> None:
    text = (run / "report.html").read_text() if report(run) else ""
    found = Outline(run / "report.html")
    assert not re.search(r"https?:|@import|url\((?!#)", text)
    assert all(reference.startswith(("#", "data:,")) for reference in found.references), found.references
    assert not {"script", "link rel=stylesheet", "iframe", "object", "img"} & set(found.tags)
    assert len(set(found.ids)) == len(found.ids)
    assert {reference[1:] for reference in found.references if reference.startswith("#")} <= set(found.ids)
    assert found.tags.count("svg") == 3


def test_the_same_run_gives_the_same_bytes(run: Path) -> None:
    first = write_run_report(load_run(run), run / "a.html", None).read_bytes()
    assert write_run_report(load_run(run), run / "b.html", None).read_bytes() == first


def test_markup_in_names_is_text(run: Path) -> None:
    evil = "<script>alert(1)</script>\"'><img src=x onerror=y>{{ 7 * 7 }}\x00\x1b$x$"
    values = pq.read_table(run / "values.parquet")
    ids = values["sample_id"].to_pylist()
    ids[int(np.argmax(values["value"].to_numpy()))] = evil
    replace_values(run, sample_id=ids)
    configure(run, model__name=evil, data__kind=evil)
    (run / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump([evil]))
    (run / "environment.json").write_text(json.dumps({"device": evil}))
    found = report(run, {evil: evil})
    assert not {"script", "img"} & set(found.tags)
    assert found.text.count("alert(1)") >= 5
    assert "49" not in (run / "report.html").read_text().partition("<main>")[0].partition("</style>")[2]


def test_markup_in_domains_is_text_in_figures_too(make_run: MakeRun) -> None:
    path = make_run(domains=("<b>bold</b>", 'x" id="header', "nul\x00\x08", "語$"))
    found = report(path)
    assert "b" not in found.tags
    assert found.text.count("<b>bold</b>") >= 3  # tables, and the labels of two figures
    assert len(set(found.ids)) == len(found.ids)


def test_no_text_is_in_it_unless_given(run: Path) -> None:
    assert "q" not in report(run).tags
    named = shown_samples(load_run(run))
    found = report(run, {named[0]: "the first words", named[-1]: "the last one's", "another": "not named"})
    assert found.tags.count("q") == 2
    assert "the first words" in found.text
    assert "the last one's" in found.text
    assert "not named" not in found.text


@pytest.mark.parametrize(
    ("missing", "title"),
    [("coverage.json", "Coverage"), ("metrics.jsonl", "Losses"), ("values.parquet", "Domains")],
)
def test_a_missing_file_is_a_line_and_not_an_error(run: Path, missing: str, title: str) -> None:
    (run / missing).unlink()
    found = report(run)
    assert title not in found.titles
    assert found.titles[-1] == "Not in this report"
    assert found.text.count(f"{missing} is missing") == 1
    assert "Run it again" in found.titles


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("coverage.json", "{"),
        ("coverage.json", "[]"),
        ("coverage.json", "{}"),
        ("coverage.json", json.dumps(COVERAGE | {"families": None})),
        ("environment.json", "{"),
        ("values.parquet", "PAR1"),
        ("metrics.jsonl", "{\n"),
        (".hydra/overrides.yaml", "- ["),
        ("scores/shard-00000.pt", ""),
    ],
)
def test_a_damaged_file_is_named(run: Path, name: str, content: str) -> None:
    (run / name).write_text(content)
    found = report(run)
    assert found.titles[-1] == "Not in this report"
    assert f"{name} is damaged" in found.text


def test_a_directory_with_a_config_alone_has_a_report(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("engine:\n  name: graddotprod\noptimizer:\n  name: sgd\n")
    found = report(tmp_path)
    assert found.titles == ["What the numbers mean", "Run it again", "Not in this report"]


def test_a_run_without_a_config_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(AnalysisError, match=r"config\.yaml"):
        load_run(tmp_path)


@pytest.mark.parametrize(
    "content", ["{}", "engine: {}", "engine: null\noptimizer: 3", "optimizer: {name: sgd}"]
)
def test_a_config_that_is_no_runs_is_an_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(AnalysisError, match=r"config\.yaml names no engine or no optimizer"):
        report(tmp_path)


def test_a_list_of_samples_is_part_of_what_was_run(run: Path) -> None:
    configure(run, data__kind="text", data__keep="best.txt", engine__val_mode="concat")
    text = report(run).text
    assert "text, keep=best.txt" in text
    assert "graddotprod, val_mode=concat" in text


def test_a_killed_run_says_where_it_was(run: Path) -> None:
    (run / "values.parquet").unlink()
    configure(run, trainer__max_steps=100)
    found = report(run)
    assert "at step 12 of 100" in found.text
    assert {"Losses", "Coverage"} <= set(found.titles)


def test_a_failed_run_says_so(run: Path) -> None:
    (run / "traceback.txt").write_text("Traceback: secret text of a sample")
    found = report(run)
    assert "ended with an error" in found.text
    assert "secret" not in found.text


def test_plain_training_has_losses_and_no_values(run: Path) -> None:
    for name in ("values.parquet", "coverage.json"):
        (run / name).unlink()
    configure(run, engine__name="regular")
    found = report(run)
    assert found.titles == ["Losses", "Cost of scoring", "Run it again"]
    assert "without a value for any sample" in found.text
    assert "Not in this report" not in found.titles


def test_an_evaluation_is_its_loss(run: Path) -> None:
    (run / "metrics.jsonl").write_text(json.dumps({"step": 0, "time": 0, "val/loss": 3.25}) + "\n")
    configure(run, trainer__eval_only=True)
    found = report(run)
    assert found.titles == ["Run it again"]
    assert "3.2500" in found.text


def test_values_that_are_not_finite_are_counted(run: Path) -> None:
    values = pq.read_table(run / "values.parquet")["value"].to_numpy().copy()
    values[:2] = np.nan, np.inf
    replace_values(run, value=values)
    assert "2 samples have no finite value" in report(run).text
    replace_values(run, value=np.full(values.size, np.nan))
    assert "has no finite value" in report(run).text


def test_values_of_one_sign_are_named_as_what_they_are(run: Path) -> None:
    values = pq.read_table(run / "values.parquet")["value"].to_numpy()
    replace_values(run, value=np.abs(values) + 1e-9)
    assert "helped least" in report(run).text
    replace_values(run, value=-np.abs(values) - 1e-9)
    assert "harmed least" in report(run).text


def test_columns_are_summed_and_crossed_with_domains(run: Path) -> None:
    configure(run, engine__resolution="family", engine__val_sets="domain")
    values = pq.read_table(run / "values.parquet").to_pylist()
    columns = {name: [row[name] for row in values] for name in ("sample_id", "domain")}
    for part, val, share in (("attn", "code", 0.5), ("mlp", "code", 0.3), ("attn", "docs", 0.2)):
        columns[f"{part} | {val}"] = [share * row["value"] for row in values]
    pq.write_table(pa.table(columns), run / "values_by_column.parquet")
    found = report(run)
    assert "Values by part" in found.titles
    total = 0.5 * sum(row["value"] for row in values)
    assert f"{1e6 * total:+.1f}".replace("-", "−") in found.text
    # A training domain's mean for the set "code" is of both parts.
    of_code = [row["value"] for row in values if row["domain"] == "code"]
    expected = 0.8 * sum(of_code) / len(of_code)
    assert f"{1e6 * expected:+.1f}".replace("-", "−") in found.text


def test_columns_that_are_missing_are_a_line(run: Path) -> None:
    configure(run, engine__resolution="family")
    assert "values_by_column.parquet is missing" in report(run).text


def test_a_projection_run_shows_its_store(run: Path) -> None:
    configure(run, engine__name="gradprojlora", engine__store=str(run / "projections"))
    store: ProjectionStore = built(run / "projections")
    coverage = {"parameters": 194, "projected_parameters": 184, "projected_parameter_share": 184 / 194}
    (run / "coverage.json").write_text(json.dumps(coverage | {"left_out": ["bare"]}))
    line = {"step": 3, "time": 0.0, "distortion/rms": 0.12, "distortion/spearman": 0.9}
    (run / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    found = report(run)
    assert found.titles[:3] == ["The store", "What rows speak of", "What the projection loses"]
    for said in (
        str(len(store)),
        "h.0.attn.weight",
        "10 × 12",
        "3 × 4",
        "gaussian, seed 0",
        "bare",
        "12.0 %",
    ):
        assert said in found.text, said
    assert "python -m runners.search" in found.text


def test_a_projection_run_without_its_store_says_so(run: Path) -> None:
    configure(run, engine__name="gradprojlora")
    found = report(run)
    assert "The store is not to be read" in found.text
    assert found.titles[-1] == "Not in this report"


def test_a_distortion_run_has_its_figure_and_table(run: Path) -> None:
    configure(run, distortion__samples=4)
    measured = {"kind": "gaussian", "rank": 16, "columns": 128, "rms": 0.3, "rms_by_seed": [0.2, 0.4]}
    measured |= {"dense_rms": 0.2, "spearman": 0.8, "recall_at_1": 0.75, "recall_at_5": None}
    content = {"model": "gpt2", "samples": 4, "seeds": 2, "measurements": [measured]}
    (run / "distortion.json").write_text(json.dumps(content))
    found = report(run)
    assert found.titles == ["What projections lose", "Run it again"]
    assert "0.3000" in found.text
    assert "75 %" in found.text
    assert "python -m runners.distortion" in found.text


def test_a_hundred_thousand_samples_stay_small(make_run: MakeRun) -> None:
    path = make_run(samples=100_000, steps=50, batch=2000, domains=tuple(f"domain{i}" for i in range(60)))
    with (path / "metrics.jsonl").open("w") as file:
        rng = np.random.default_rng(0)
        for step, loss in enumerate(rng.normal(size=20_000)):
            file.write(json.dumps({"step": step, "time": 0.0, "train/loss": loss, "val/loss": loss}) + "\n")
    report(path)
    assert (path / "report.html").stat().st_size < 2_000_000
