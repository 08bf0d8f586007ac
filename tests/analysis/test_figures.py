"""Figures as elements of a page, and long series in few points."""

from xml.etree import ElementTree

import numpy as np
import pytest

from analysis.figures import Drawing, new_figure, plain, svg, thinned


def drawing(text: str = "title") -> Drawing:
    figure = new_figure(3, 2)
    axes = figure.subplots()
    axes.plot([1, 2, 3], [1, 3, 2], marker="o", label=plain(text))
    axes.bar([1], [2], hatch="////")
    axes.legend()
    return Drawing(figure, text, ["a note"])


def test_an_svg_is_the_same_each_time_and_its_names_are_its_own() -> None:
    first, again, other = svg(drawing(), "one"), svg(drawing(), "one"), svg(drawing(), "two")
    assert first == again
    ids = [
        {e.attrib["id"] for e in ElementTree.fromstring(t).iter() if "id" in e.attrib} for t in (first, other)
    ]
    assert ids[0]
    assert not ids[0] & ids[1]


def test_all_references_of_an_svg_lead_somewhere() -> None:
    root = ElementTree.fromstring(svg(drawing(), "one"))
    ids = {element.attrib["id"] for element in root.iter() if "id" in element.attrib}
    references = set()
    for element in root.iter():
        for name, value in element.attrib.items():
            if name == "href":
                references.add(value.removeprefix("#"))
            elif "url(#" in value:
                references.add(value.partition("url(#")[2].partition(")")[0])
    assert references == ids
    assert any(element.tag == "pattern" for element in root.iter())  # hatches
    assert any(element.tag == "clipPath" for element in root.iter())


def test_text_stays_text_and_words_about_the_figure_stay_out() -> None:
    text = svg(drawing('<b>"url(#x)" id="y" & \x00'), "one")
    root = ElementTree.fromstring(text)
    assert '<b>"url(#x)" id="y" & \N{REPLACEMENT CHARACTER}' in [e.text for e in root.iter("text")]
    assert "a note" not in text
    assert "http" not in text


@pytest.mark.parametrize("size", [1, 5, 1199, 1200, 1201, 100_000])
def test_thinning_keeps_ends_and_extremes(size: int) -> None:
    values = np.random.default_rng(0).standard_cauchy(size)
    shown = thinned(values)
    assert shown.size <= 1202
    assert {0, size - 1, int(values.argmin()), int(values.argmax())} <= set(shown.tolist())
    assert (np.diff(shown) > 0).all()


def test_thinning_keeps_extremes_beside_gaps() -> None:
    values = np.zeros(10_000)
    values[::2] = np.nan
    values[5001] = 7.0
    assert 5001 in thinned(values)
    assert thinned(np.full(10_000, np.nan)).size
    assert thinned(np.zeros(10_000), lines=200).size <= 102
