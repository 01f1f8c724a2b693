from __future__ import annotations

import re
import struct
import xml.etree.ElementTree as ET
import zlib
from base64 import b64decode
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesaic.trace.plots import Bars, HeatMap, Lines, Panels, Plot, Radar, Series, save, svg
from moesaic.trace.plots.colours import DIVERGING, NOT_USED, SEQUENTIAL, ramp
from moesaic.trace.plots.image import png


def draw(plot: Plot) -> ET.Element:
    return ET.fromstring(svg(plot, "a < b"))


def heat_map(values: Any, **options: Any) -> HeatMap:
    rows, columns = np.asarray(values).shape
    names = {"row_names": [str(n) for n in range(rows)], "column_names": [str(n) for n in range(columns)]}
    return HeatMap(np.asarray(values, dtype=float), "row", "column", "value", **(names | options))


def pixels(element: ET.Element) -> list[list[str]]:
    """Colours of the picture in a heat map, decoded from its PNG file."""
    content = b64decode(next(element.iter("image")).attrib["href"].split(",")[1])
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, at = {}, 8
    while at < len(content):
        (size,) = struct.unpack(">I", content[at : at + 4])
        kind, body = content[at + 4 : at + 8], content[at + 8 : at + 8 + size]
        assert struct.unpack(">I", content[at + 8 + size : at + 12 + size])[0] == zlib.crc32(kind + body)
        chunks[kind] = body
        at += 12 + size
    width, height = struct.unpack(">II", chunks[b"IHDR"][:8])
    lines = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), dtype=np.uint8).reshape(height, width + 1)
    assert not lines[:, 0].any()
    palette = chunks[b"PLTE"]
    return [["#" + palette[3 * index : 3 * index + 3].hex() for index in line] for line in lines[:, 1:]]


def test_every_cell_has_the_colour_of_its_value():
    found = pixels(draw(heat_map([[0.0, 1.0, 2.0], [4.0, float("nan"), 4.0]])))
    assert found[0] == [SEQUENTIAL[0], SEQUENTIAL[2], SEQUENTIAL[4]]
    assert [found[1][0], found[1][2]] == [SEQUENTIAL[8], SEQUENTIAL[8]]
    assert found[1][1] not in SEQUENTIAL


def test_values_beyond_the_maximum_take_the_last_colour():
    assert pixels(draw(heat_map([[1.0, 9.0]], maximum=2.0)))[0][1] == SEQUENTIAL[-1]


def test_ratios_are_neutral_at_one_and_symmetric_and_zeros_are_marked():
    found = pixels(draw(heat_map([[0.0, 0.25, 0.5, 1.0, 2.0, 4.0]], scale="ratio")))
    assert found[0] == [NOT_USED, DIVERGING[0], DIVERGING[2], DIVERGING[4], DIVERGING[6], DIVERGING[8]]
    words = [text.text for text in draw(heat_map([[0.0, 4.0]], scale="ratio")).iter("text")]
    assert "never picked" in words
    assert "never picked" not in [text.text for text in draw(heat_map([[0.5, 4.0]], scale="ratio")).iter("text")]


def test_a_thousand_experts_of_sixty_layers_are_few_nodes():
    values = np.random.default_rng(0).gamma(2.0, 0.5, (60, 1000))
    drawn = svg(heat_map(values, scale="ratio"), "large")
    assert len(drawn) < 120_000
    assert len(list(ET.fromstring(drawn).iter())) < 300
    assert len(pixels(ET.fromstring(drawn))[59]) == 1000


@pytest.mark.parametrize("anchors", [SEQUENTIAL, DIVERGING[4:], DIVERGING[4::-1]])
def test_colours_darken_without_a_break(anchors: tuple[str, ...]):
    greys = ramp(anchors).astype(float) @ [0.299, 0.587, 0.114]
    assert (np.diff(greys) <= 0.5).all()


def test_a_picture_of_one_pixel():
    assert png(np.zeros((1, 1), dtype=np.uint8), np.zeros((1, 3), dtype=np.uint8)).endswith(b"IEND\xaeB`\x82")


def test_names_are_escaped():
    element = draw(heat_map([[1.0]], row_names=["<i>"]))
    assert element.get("aria-label") == "a < b"
    assert "<i>" in [text.text for text in element.iter("text")]


def bars(values: list[float], **options: Any) -> ET.Element:
    return draw(Bars(np.array(values), "c", "v", [str(n) for n in range(len(values))], **options))


@pytest.mark.parametrize("values", [[1.0, 2.0, 0.5], [0.0, 0.0], [3e-5], [1234.0, 1.0]])
def test_bars_are_as_tall_as_their_values(values: list[float]):
    path = next(path for path in bars(values).iter("path") if path.get("class") == "bar")
    heights = np.array([float(tall) for tall in re.findall(r"v-?([\d.]+)h", str(path.get("d")))])
    largest = max(values)
    assert len(heights) == len(values)
    assert heights.max() <= 200
    if largest:
        assert heights.max() > 100
        np.testing.assert_allclose(heights / heights.max(), np.array(values) / largest, atol=1e-3)


def test_names_thin_out_where_they_would_overlap():
    labels = [text for text in bars([1.0] * 200).iter("text") if text.get("y") == "224.0"]
    assert [text.text for text in labels][:3] == ["0", "8", "16"]


def line_points(element: ET.Element) -> list[list[tuple[float, float]]]:
    """Points of each line of a line chart, pieces apart; the entries of the legend left out."""
    paths = [str(path.get("d")) for path in element.iter("path") if path.get("class") == "line"]
    pieces = [piece for path in paths if "h24" not in path for piece in path.split("M") if piece]
    return [[tuple(map(float, point.split())) for point in piece.split("L")] for piece in pieces]


def test_lines_go_through_their_values_and_break_where_there_is_none():
    y_P = np.array([0.0, 1.0, np.nan, 0.5])
    (first, second) = line_points(draw(Lines([Series("a", np.arange(4.0), y_P)], "x", "y", maximum=1.0)))
    assert [len(first), len(second)] == [2, 1]
    assert first[0][1] - first[1][1] == pytest.approx(230.0)
    assert first[0][1] - second[0][1] == pytest.approx(115.0)


def test_a_logarithmic_axis_has_equal_steps_for_equal_factors():
    x_P = np.array([1.0, 10.0, 100.0, 1000.0])
    ((*points,),) = line_points(draw(Lines([Series("a", x_P, x_P)], "x", "y", log_x=True)))
    steps = np.diff([x for x, _ in points])
    np.testing.assert_allclose(steps, steps[0], atol=0.2)


def test_bands_references_and_what_values_rest_on_are_drawn():
    x_P, y_P = np.arange(5.0), np.linspace(0, 1, 5)
    series = [Series("a", x_P, y_P, y_P - 0.1, y_P + 0.1), Series("b", x_P, 1 - y_P)]
    element = draw(Lines(series, "x", "y", reference=(0.5, "chance"), behind=Series("texts", x_P, y_P * 100)))
    styles = [part.get("class") for part in element.iter()]
    assert {"band", "reference", "behind"} <= set(styles)
    assert {"a", "b", "chance", "texts"} <= {text.text for text in element.iter("text")}


def test_a_radar_has_a_corner_for_each_axis():
    element = draw(Radar({"code": np.array([0.5, 0.25, 0.25]), "prose": np.full(3, 1 / 3)}, ["0", "1", "2"], "share"))
    lines = [str(path.get("d")) for path in element.iter("path") if path.get("class") == "line"]
    assert [line.count("L") for line in lines if line.endswith("z")] == [2, 2]


def test_nothing_is_drawn_without_an_error():
    empty = np.zeros(0)
    for plot in (heat_map(np.zeros((1, 1))), Bars(empty, "c", "v", []), Lines([], "x", "y"), Radar({}, [], "share")):
        draw(plot)


def test_panels_have_a_strip_for_each_group():
    values = {"code": np.array([1.0, 2.0]), "prose": np.array([0.0, 4.0])}
    element = draw(Panels(values, "expert", "share", ["0", "1"], reference=(1.0, "even")))
    strips = [str(path.get("d")) for path in element.iter("path") if path.get("class") == "bar"]
    heights = [[float(tall) for tall in re.findall(r"v-?([\d.]+)h", strip)] for strip in strips]
    assert heights[0][1] * 2 == pytest.approx(heights[1][1])  # one scale for all
    assert {"code", "prose", "- - even"} <= {text.text for text in element.iter("text")}


PLOTS = {
    "heat": heat_map([[0.0, 1.0], [2.0, float("nan")]], scale="ratio"),
    "bars": Bars(np.array([1.0, 2.0]), "c", "v", ["0", "1"], reference=(1.0, "even")),
    "panels": Panels({"a": np.array([1.0]), "b": np.array([2.0])}, "c", "v", ["0"]),
    "lines": Lines(
        [Series("a", np.arange(3.0), np.ones(3), np.zeros(3), np.full(3, 2.0))],
        "x",
        "y",
        log_x=True,
        reference=(1.0, "chance"),
        behind=Series("texts", np.arange(3.0), np.arange(3.0)),
    ),
    "radar": Radar({"a": np.array([1.0, 2.0, 1.0])}, ["0", "1", "2"], "share", reference=(1.0, "even")),
}


@pytest.mark.parametrize("name", PLOTS)
def test_every_kind_is_written_as_a_file_twice_the_same(name: str, tmp_path: Path):
    (path,) = save(PLOTS[name], "a title", tmp_path, name, ("svg",))
    before = path.read_bytes()
    assert b"a title" in before
    save(PLOTS[name], "a title", tmp_path, name, ("svg",))
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [f"{name}.svg"]
