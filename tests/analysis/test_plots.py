import json
import logging
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import matplotlib.image
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from analysis import plots
from analysis.errors import AnalysisError
from analysis.figures import domain_styles, new_figure, shortened
from analysis.plots import plot_run

MakeRun = Callable[..., Path]

ALL = ["domain_value.png", "loss.png", "top_bottom.png", "value_histogram.png"]


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"heavy": True, "steps": 80},
        {"domains": ("digits",), "steps": 1, "batch": 3},
        {"constant": 0.5},
        {"constant": 0.0},
        {"domains": tuple(f"domain{i}" for i in range(12)), "samples": 100},
    ],
    ids=["plain", "heavy", "one-domain-one-step", "equal", "zero", "many-domains"],
)
def test_every_shape_of_run_gives_four_figures(make_run: MakeRun, shape: dict) -> None:
    path = make_run(**shape)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # empty axes, clipped text and missing glyphs are warnings
        drawn = plot_run(path)
    assert sorted(file.name for file in drawn) == ALL
    for file in drawn:
        assert file.parent == path / "plots"
        pixels = matplotlib.image.imread(file)[..., :3]
        assert min(pixels.shape[:2]) > 150
        assert (pixels < 0.9).mean() > 0.005  # something is drawn


def test_run_without_values_has_its_losses_drawn(make_run: MakeRun, caplog: pytest.LogCaptureFixture) -> None:
    path = make_run()
    (path / "values.parquet").unlink()
    with caplog.at_level(logging.INFO):
        assert [file.name for file in plot_run(path)] == ["loss.png"]
    assert "has no values" in caplog.text


def test_run_without_losses_says_so(make_run: MakeRun, caplog: pytest.LogCaptureFixture) -> None:
    path = make_run()
    (path / "metrics.jsonl").write_text(json.dumps({"step": 1, "time": 0, "lr": 1.0}) + "\n")
    with caplog.at_level(logging.INFO):
        assert "loss.png" not in [file.name for file in plot_run(path)]
    assert "loss.png is not drawn" in caplog.text


def test_values_that_are_not_finite_do_not_stop_the_figures(make_run: MakeRun) -> None:
    path = make_run()
    table = pq.read_table(path / "values.parquet")
    value = table["value"].to_numpy().copy()
    value[:2] = np.nan, np.inf
    columns = {name: table[name] for name in table.column_names} | {"value": pa.array(value)}
    pq.write_table(pa.table(columns), path / "values.parquet")
    assert sorted(file.name for file in plot_run(path)) == ALL


def test_damaged_run_is_an_error(make_run: MakeRun) -> None:
    path = make_run()
    (path / "scores" / "shard-00000.pt").write_bytes(b"")
    with pytest.raises(AnalysisError, match=r"shard-00000\.pt"):
        plot_run(path)


def test_no_bar_mixes_signs_and_none_is_lost() -> None:
    axes = new_figure(4, 3).subplots()
    for values in (np.array([-1.0, 2.0]), np.array([3.0, 3.0]), np.array([-0.7]), np.zeros(4)):
        edges = plots._edges(values, axes)
        assert 0.0 in edges
        assert np.histogram(values, edges)[0].sum() == values.size
        assert np.histogram(values[values < 0], edges)[0][edges[:-1] >= 0].sum() == 0


@pytest.mark.parametrize("scale", [1.0, 1e-6])
def test_axis_is_logarithmic_only_for_heavy_tails(scale: float) -> None:
    assert plots._linear_threshold(scale * np.linspace(-1, 1, 101)) is None
    assert plots._linear_threshold(np.zeros(3)) is None
    heavy = scale * np.concatenate([np.full(100, 2.0), [500.0]])
    assert plots._linear_threshold(heavy) == pytest.approx(scale)


def test_small_domains_share_a_panel() -> None:
    domains = np.array([f"d{i}" for i in range(10) for _ in range(20 - i)])
    panels = plots._panels(domains)
    assert list(panels) == [f"d{i}" for i in range(7)] + ["3 other domains"]
    assert sorted(panels["3 other domains"]) == ["d7", "d8", "d9"]


def test_domains_keep_their_style_and_none_share_one() -> None:
    names = [f"d{i:02d}" for i in range(20)]
    styles = domain_styles(names)
    assert styles == domain_styles(reversed(names))
    assert len(set(styles.values())) == 20


def test_long_ids_keep_both_ends() -> None:
    assert shortened("short", 10) == "short"
    assert shortened("package/module.py:17", 11) == "packa…py:17"


def test_drawing_needs_no_pyplot() -> None:
    code = "import sys, analysis.plots; assert 'matplotlib.pyplot' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(plots.__file__).parents[1])
