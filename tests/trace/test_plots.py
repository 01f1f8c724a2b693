from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from moesaic.trace import plots


def draw(values: list[list[float]], **kwargs) -> ET.Element:
    names = {
        "row_names": [str(n) for n in range(len(values))],
        "column_names": [str(n) for n in range(len(values[0]))],
    }
    options = {"label": "a < b", "row_title": "row", "column_title": "column"} | names | kwargs
    return ET.fromstring(plots.heatmap(np.array(values), **options))


def cells(svg: ET.Element) -> dict[tuple[int, int], str]:
    """Colour of each cell by (row, column)."""
    paths = [path for path in svg.iter("path") if path.get("fill")]
    return {
        (int(row), int(column)): str(path.get("fill"))
        for path in paths
        for column, row in re.findall(r"M(\d+) (\d+)h1", str(path.get("d")))
    }


def test_every_cell_has_the_colour_of_its_value():
    found = cells(draw([[0.0, 1.0, 2.0], [4.0, float("nan"), 4.0]]))
    assert found == {
        (0, 0): plots.ANCHORS[0],
        (0, 1): plots.ANCHORS[2],
        (0, 2): plots.ANCHORS[4],
        (1, 0): plots.ANCHORS[8],
        (1, 2): plots.ANCHORS[8],
    }


def test_values_beyond_the_maximum_take_the_last_colour():
    assert cells(draw([[1.0, 9.0]], maximum=2.0))[0, 1] == plots.ANCHORS[-1]


def test_a_matrix_of_zeros_is_drawn():
    svg = draw([[0.0, 0.0]], mark_zeros=True)
    assert set(cells(svg).values()) == {plots.ANCHORS[0]}
    assert len([path for path in svg.iter("path") if path.get("class") == "cross"]) == 2


def test_colours_darken_without_a_break():
    def grey(colour: str) -> float:
        red, green, blue = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
        return 0.299 * red + 0.587 * green + 0.114 * blue

    greys = [grey(plots.colour(level)) for level in range(plots.LEVELS)]
    assert greys == sorted(greys, reverse=True)


def test_names_are_escaped():
    assert draw([[1.0]], row_names=["<i>"]).get("aria-label") == "a < b"


def bars(values: list[float], **kwargs) -> ET.Element:
    names = [str(n) for n in range(len(values))]
    drawn = plots.bars(np.array(values), label="x", column_title="c", value_title="v", names=names, **kwargs)
    return ET.fromstring(drawn)


@pytest.mark.parametrize("values", [[1.0, 2.0, 0.5], [0.0, 0.0], [3e-5], [1234.0, 1.0]])
def test_bars_are_as_tall_as_their_values(values: list[float]):
    found = [rect for rect in bars(values).iter("rect") if rect.get("class") == "bar"]
    heights = np.array([float(str(rect.get("height"))) for rect in found])
    largest = max(values)
    assert heights.max() <= 220
    if largest:
        assert heights.max() > 110
        np.testing.assert_allclose(heights / heights.max(), np.array(values) / largest, atol=1e-3)


def test_names_thin_out_where_they_would_overlap():
    labels = [text for text in bars([1.0] * 200).iter("text") if text.get("y") == "244.00"]
    assert [text.text for text in labels][:3] == ["0", "8", "16"]
