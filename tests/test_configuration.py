"""Configuration: overrides, round trips, and errors that name the field, the value and the remedy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, PositiveInt, model_validator

from moesaic.configuration import Config, apply_overrides, read_yaml
from moesaic.errors import ConfigError, MoesaicError


class Circle(Config):
    type: Literal["circle"] = "circle"
    radius: float = Field(gt=0)


class Box(Config):
    type: Literal["box"] = "box"
    width: float
    height: float = 1.0

    @model_validator(mode="after")
    def _wide(self) -> Box:
        if self.width < self.height:
            raise ConfigError("width", self.width, "is less than height", "turn the box")
        return self


Shape = Annotated[Circle | Box, Field(discriminator="type")]


class Drawing(Config):
    title: str
    copies: PositiveInt = 1
    style: Literal["plain", "bold"] = "plain"
    main: Shape | None = None
    others: tuple[Shape, ...] = ()


FULL: dict[str, Any] = {
    "title": "two shapes",
    "copies": 3,
    "style": "bold",
    "main": {"type": "circle", "radius": 0.5},
    "others": [{"type": "box", "width": 2.0, "height": 1.0}, {"type": "circle", "radius": 1.0}],
}


# --- Making and writing -----------------------------------------------------------------------------------------------


def test_round_trips_through_dict_and_yaml(tmp_path: Path) -> None:
    drawing = Drawing.from_dict(FULL)
    assert drawing.to_dict() == FULL
    assert Drawing.from_dict(drawing.to_dict()) == drawing
    path = tmp_path / "drawing.yaml"
    path.write_text(drawing.to_yaml(), encoding="utf-8")
    assert Drawing.from_yaml(path) == drawing
    assert list(read_yaml(path)) == list(FULL)  # keys in the order of the fields


def test_objects_are_immutable() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Circle(radius=1).radius = 2  # type: ignore[misc]


def test_file_and_overrides_are_combined(tmp_path: Path) -> None:
    path = tmp_path / "drawing.yaml"
    path.write_text("title: ä\nothers:\n- {type: circle, radius: 1}\n", encoding="utf-8")
    drawing = Drawing.from_yaml(path, ["others.0.radius=3", "copies=2", "main={type: box, width: 4}"])
    assert drawing == Drawing(title="ä", copies=2, main=Box(width=4), others=(Circle(radius=3),))


# --- Errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, r"title = None is required; set it"),
        ({"title": "a", "copies": 0}, r"copies = 0 is not valid; input should be greater than 0"),
        ({"title": "a", "copies": "many"}, r"copies = 'many' is not valid; input should be a valid integer"),
        ({"title": "a", "style": "thin"}, r"style = 'thin' is not one of the choices; choose one of 'plain' or 'bold'"),
        (
            {"title": "a", "copis": 2},
            r"copis = 2 is not a known key; did you mean 'copies'\? known here: copies, main, others, style, title",
        ),
        ({"title": "a", "zzz": 2}, r"zzz = 2 is not a known key; known here: copies"),
        ({"title": "a", "main": {"type": "circle"}}, r"main\.radius = None is required"),
        ({"title": "a", "main": {"type": "circle", "radius": 0}}, r"main\.radius = 0 is not valid; .*greater than 0"),
        ({"title": "a", "main": {"radius": 1}}, r"main\.type = None is required; set it to choose"),
        (
            {"title": "a", "main": {"type": "cube", "radius": 1}},
            r"main\.type = 'cube' is not one of the choices; choose one of 'circle', 'box'",
        ),
        (
            {"title": "a", "main": {"type": "circle", "radius": 1, "width": 1}},
            r"main\.width = 1 is not a known key; known here: radius, type$",
        ),
        (
            {"title": "a", "others": [{"type": "circle", "radius": 1}, {"type": "box", "width": 1, "hight": 1}]},
            r"others\.1\.hight = 1 is not a known key; did you mean 'height'\?",
        ),
        (
            {"title": "a", "others": [{"type": "box", "width": 0.5}]},
            r"others\.0\.width = 0\.5 is less than height; turn the box",
        ),
        ({"title": "a", "main": {"type": "circle", "radius": float("nan")}}, r"main\.radius = nan is not valid"),
        ({"title": "a", "main": {"type": "box", "width": float("inf")}}, r"main\.width = inf is not valid"),
        ({"title": "a", "main": 3}, r"main = 3 is not valid"),
    ],
)
@pytest.mark.parametrize("where", ["", "run.drawing"])
def test_error_names_path_value_and_remedy(values: dict[str, Any], message: str, where: str) -> None:
    prefix = where.replace(".", r"\.") + r"\." if where else ""
    with pytest.raises(ConfigError, match=f"^{prefix}{message}") as raised:
        Drawing.from_dict(values, where=where)
    assert raised.value.__cause__ is None  # pydantic's own report stays out of the way
    assert raised.value.__suppress_context__


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"titel": "a"}, r"titel = 'a' is not a known key; did you mean 'title'\?"),
        ({"copies": 0, "titel": "a"}, r"titel = 'a' is not a known key; did you mean 'title'\?"),
        (
            {"title": "a", "main": {"type": "circle", "radios": 1}},
            r"main\.radios = 1 is not a known key; did you mean 'radius'\?",
        ),
    ],
)
def test_unknown_key_is_told_before_the_missing_one_it_misspells(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        Drawing.from_dict(values)


def test_config_error_can_be_caught_as_either_family_and_read_by_field() -> None:
    with pytest.raises(MoesaicError):
        Drawing.from_dict({})
    error = ConfigError("a.b", 3, "is odd", "choose 2 or 4")
    assert isinstance(error, ValueError)
    assert str(error) == "a.b = 3 is odd; choose 2 or 4"
    assert (error.field, error.value, error.problem, error.remedy) == ("a.b", 3, "is odd", "choose 2 or 4")


# --- YAML files -------------------------------------------------------------------------------------------------------


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^config = '.*none\.yaml' is not a file; give the path of a YAML file"):
        Drawing.from_yaml(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"title: [1, 2\ncopies: 3\n", r"is not valid YAML \(.*line 2, column 7.*\); correct that line"),
        (b"\xff\xfe\x00", r"is not valid YAML \(.*invalid start byte.*\)"),
        (b"- a\n- b\n", r"does not hold a mapping; write `key: value` lines at the top level"),
        (b"", r"does not hold a mapping"),
    ],
    ids=["syntax", "not text", "list", "empty"],
)
def test_file_that_is_not_a_yaml_mapping(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"^config = '.*bad\.yaml' {message}"):
        read_yaml(path)


# --- Overrides --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("a=2", {"a": 2, "b": {"c": 1}, "l": [1, {"d": 2}]}),
        ("b.c=true", {"a": 1, "b": {"c": True}, "l": [1, {"d": 2}]}),
        ("b.x.y=z", {"a": 1, "b": {"c": 1, "x": {"y": "z"}}, "l": [1, {"d": 2}]}),
        ("b=null", {"a": 1, "b": None, "l": [1, {"d": 2}]}),
        ("a=[1, 2]", {"a": [1, 2], "b": {"c": 1}, "l": [1, {"d": 2}]}),
        ("a={x: 1}", {"a": {"x": 1}, "b": {"c": 1}, "l": [1, {"d": 2}]}),
        ("a=x=y", {"a": "x=y", "b": {"c": 1}, "l": [1, {"d": 2}]}),
        (" a =0.5", {"a": 0.5, "b": {"c": 1}, "l": [1, {"d": 2}]}),
        ("l.0=7", {"a": 1, "b": {"c": 1}, "l": [7, {"d": 2}]}),
        ("l.1.d=7", {"a": 1, "b": {"c": 1}, "l": [1, {"d": 7}]}),
    ],
)
def test_override_sets_one_value_and_leaves_the_source_alone(override: str, expected: dict[str, Any]) -> None:
    values = {"a": 1, "b": {"c": 1}, "l": [1, {"d": 2}]}
    assert apply_overrides(values, [override]) == expected
    assert values == {"a": 1, "b": {"c": 1}, "l": [1, {"d": 2}]}


def test_later_overrides_win() -> None:
    assert apply_overrides({}, ["a.b=1", "a.b=2", "a.c=3"]) == {"a": {"b": 2, "c": 3}}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("a", r"--set = 'a' has no `=`; write it as a\.b=value"),
        ("=3", r"--set = '=3' has no `=`"),
        ("a.b=3", r"--set = 'a\.b=3' goes through a, which is not a mapping; check the path"),
        ("b.c.d=3", r"--set = 'b\.c\.d=3' goes through b\.c, which is not a mapping"),
        ("l.2=3", r"--set = 'l\.2=3' needs a list index where it says '2'; use 0 to 1"),
        ("l.x=3", r"--set = 'l\.x=3' needs a list index where it says 'x'; use 0 to 1"),
        ("l.-1.d=3", r"--set = 'l\.-1\.d=3' needs a list index where it says '-1'"),
        ("l.0.d=3", r"--set = 'l\.0\.d=3' goes through l\.0, which is not a mapping"),
        ("a=[1, 2", r"--set = 'a=\[1, 2' has a right side that is not YAML; put it in quotes to set a string"),
    ],
)
def test_override_that_cannot_be_applied_is_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        apply_overrides({"a": 1, "b": {"c": 1}, "l": [1, {"d": 2}]}, [override])


@given(
    st.lists(st.sampled_from(["a", "b", "c"]), min_size=1, max_size=4),
    st.one_of(st.integers(), st.booleans(), st.none(), st.sampled_from(["text", "two words"])),
)
def test_override_makes_the_path_it_needs(path: list[str], value: int | str | None) -> None:
    node: Any = apply_overrides({}, [f"{'.'.join(path)}={json.dumps(value)}"])  # JSON is YAML
    for part in path:
        node = node[part]
    assert node == value
    assert type(node) is type(value)
