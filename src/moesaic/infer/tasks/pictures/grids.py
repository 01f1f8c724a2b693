"""Which decodings of a sweep differ in nothing but numbers: a k sweep is one line, a grid of rank and beta a line for each rank."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moesaic.infer.tasks.sweep import SweepPoint

Number = int | float
_Leaf = tuple[str, ...]


@dataclass(frozen=True)
class Line:
    """Decodings along one parameter.

    Attributes:
        values: of the other parameters that differ in the grid; empty for a single line.
        points: decodings by value of the parameter, in its order.
    """

    values: tuple[Number, ...]
    points: Mapping[Number, SweepPoint]


@dataclass(frozen=True)
class Grid:
    """Decodings that differ in one parameter or more.

    Attributes:
        name: what all of them say.
        along: parameter along a line.
        across: parameters that lines differ in.
        lines: in the order of their values.
    """

    name: str
    along: str
    across: tuple[str, ...]
    lines: tuple[Line, ...]

    def label(self, line: Line) -> str:
        """What a line is called."""
        return ", ".join(
            [self.name, *(f"{name} {value:g}" for name, value in zip(self.across, line.values, strict=True))]
        )

    @property
    def is_plane(self) -> bool:
        """Whether it has rows and columns: two parameters, with two values or more each."""
        return len(self.across) == 1 and len(self.lines) > 1 and max(len(line.points) for line in self.lines) > 1


def grids_of(points: Sequence[SweepPoint]) -> tuple[list[Grid], list[SweepPoint]]:
    """The grids among decodings, and those that belong to none."""
    alike: dict[Any, list[tuple[SweepPoint, dict[_Leaf, Number]]]] = {}
    for point in points:
        leaves = dict(_leaves(point.decoding.model_dump(mode="json")))
        numbers = {path: value for path, value in leaves.items() if _is_number(value)}
        others = tuple((path, value) for path, value in leaves.items() if path not in numbers)
        alike.setdefault((tuple(numbers), others), []).append((point, numbers))
    grids: list[Grid] = []
    alone: list[SweepPoint] = []
    for members in alike.values():
        grid = _grid(members) if len(members) > 1 else None
        if grid is not None and any(len(line.points) > 1 for line in grid.lines):
            grids.append(grid)
        else:
            alone += [point for point, _ in members]
    return grids, alone


def _grid(members: Sequence[tuple[SweepPoint, dict[_Leaf, Number]]]) -> Grid:
    varying = [path for path in members[0][1] if len({numbers[path] for _, numbers in members}) > 1]
    # Ranks and counts tell lines apart, strengths and temperatures run along them.
    along = max(varying, key=lambda path: (any(isinstance(n[path], float) for _, n in members), varying.index(path)))
    across = [path for path in varying if path != along]
    lines: dict[tuple[Number, ...], dict[Number, SweepPoint]] = {}
    for point, numbers in sorted(members, key=lambda member: member[1][along]):
        lines.setdefault(tuple(numbers[path] for path in across), {})[numbers[along]] = point
    words = [set(point.label.split()) for point, _ in members]
    name = " ".join(word for word in members[0][0].label.split() if all(word in others for others in words))
    return Grid(
        name or members[0][0].label.split()[0],
        _name(along),
        tuple(map(_name, across)),
        tuple(Line(values, lines[values]) for values in sorted(lines)),
    )


def _leaves(value: Any, path: _Leaf = ()) -> Iterator[tuple[_Leaf, Any]]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _leaves(inner, (*path, name))
    elif isinstance(value, list):
        for place, inner in enumerate(value):
            yield from _leaves(inner, (*path, str(place)))
        yield (*path, "length"), str(len(value))
    else:
        yield path, value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _name(path: _Leaf) -> str:
    """The last word of a path that is not a place in a list."""
    return next(word for word in reversed(path) if not word.isdigit())
