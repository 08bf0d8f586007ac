"""The plot of a distortion report."""

import json
import warnings
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest

from analysis.distortion import plot_distortion, read_report
from analysis.errors import AnalysisError


def measurement(kind: str, rank: int, rms: float = 0.3, **changes: Any) -> dict[str, Any]:
    dense = rms / 1.45
    found = {
        "kind": kind,
        "rank": rank,
        "rms": rms,
        "rms_by_seed": [0.9 * rms, 1.1 * rms],
        "dense_rms": dense,
    }
    return found | {"spearman": 1 - rms / 2} | changes


def write(path: Path, *measurements: dict[str, Any]) -> Path:
    path.write_text(
        json.dumps({"model": "gpt$2", "samples": 12, "seeds": 2, "measurements": list(measurements)})
    )
    return path


SHAPES = {
    "kinds": [
        measurement(kind, rank, 1 / rank**0.5)
        for rank in (256, 16, 64)
        for kind in ("gaussian", "rademacher")
    ],
    "one": [measurement("gaussian", 64)],
    "no-error": [measurement("gaussian", rank, 0.0) for rank in (16, 64)],
    "no-correlation": [measurement("gaussian", rank, spearman=None) for rank in (16, 64)],
    "unlike-ranks": [
        measurement("gaussian", 16),
        measurement("gaussian", 256),
        measurement("orthonormal", 64),
    ],
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_shape_of_report_is_drawn(tmp_path: Path, shape: list[dict[str, Any]]) -> None:
    report = write(tmp_path / "distortion.json", *shape)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # empty axes, clipped text and missing glyphs are warnings
        path = plot_distortion(report, tmp_path / "plots" / "distortion.png")
    pixels = matplotlib.image.imread(path)[..., :3]
    assert (pixels < 0.9).mean() > 0.005


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"measurements": []}'])
def test_a_damaged_report_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "distortion.json"
    path.write_text(content)
    with pytest.raises(AnalysisError, match=r"distortion.json is no distortion report"):
        read_report(path)


def test_a_missing_report_is_named(tmp_path: Path) -> None:
    with pytest.raises(AnalysisError, match=r"nothing.json is no distortion report"):
        plot_distortion(tmp_path / "nothing.json", tmp_path / "plot.png")
