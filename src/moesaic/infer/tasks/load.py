"""Reading a task: one JSON object a line, with defaults in the first line if there are any."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moesaic.errors import ConfigError, DataError
from moesaic.infer.tasks.schema import ChoiceItem, GenerateItem, Item

_KINDS: dict[str, type[ChoiceItem] | type[GenerateItem]] = {"choice": ChoiceItem, "generate": GenerateItem}


@dataclass(frozen=True)
class Task:
    """Items to evaluate.

    Attributes:
        name: of the file, without its ending.
        items: by id, in the order of the file.
    """

    name: str
    items: Mapping[str, Item]


def load_task(path: str | Path) -> Task:
    """Read a task file.

    A first line `{"defaults": {...}}` gives fields to all items that don't have them, if their kind knows them. An
    item with `choices` is multiple choice, any other one is generated.

    Raises:
        DataError: naming file, line and field of what is wrong: no such file, no items, JSON that does not parse,
            fields that are missing, unknown or wrong, an id that is there twice.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"task = {str(path)!r} is not a file; give the path of a JSONL file")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from None
    items: dict[str, Item] = {}
    defaults: dict[str, Any] | None = None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        values = _parsed(line, where)
        if set(values) == {"defaults"} and defaults is None and not items:
            defaults = _checked_defaults(values["defaults"], where)
            continue
        try:
            item = _item(values, defaults or {})
        except ConfigError as error:
            raise DataError(f"{where}: {error}") from None
        name = item.id if item.id is not None else str(len(items))
        if name in items:
            raise DataError(f"{where}: id = {name!r} is there twice; give every item, or none, an id of its own")
        items[name] = item
    if not items:
        raise DataError(f"{path}: holds no items; write one JSON object a line")
    return Task(path.stem, items)


def _parsed(line: str, where: str) -> dict[str, Any]:
    try:
        values = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}, column {error.colno}: is not JSON ({error.msg}); write one object a line") from None
    if not isinstance(values, dict):
        raise DataError(f"{where}: is not a JSON object; write {{...}}")
    return values


def _checked_defaults(defaults: Any, where: str) -> dict[str, Any]:
    if not isinstance(defaults, dict):
        raise DataError(f"{where}: defaults = {defaults!r} is not an object; write {{...}}")
    known = {name for kind in _KINDS.values() for name in kind.model_fields} - {"id", "prompt", "answer", "type"}
    for name in defaults:
        if name not in known:
            raise DataError(f"{where}: defaults.{name} is not a known default; known here: {', '.join(sorted(known))}")
    return defaults


def _item(values: dict[str, Any], defaults: Mapping[str, Any]) -> Item:
    kind = values.get("type", "choice" if "choices" in values or "choices" in defaults else "generate")
    if kind not in _KINDS:
        raise ConfigError("type", kind, "is not one of the choices", f"choose one of {', '.join(_KINDS)}")
    model = _KINDS[kind]
    given = {name: value for name, value in defaults.items() if name in model.model_fields and name not in values}
    # An item's own way to find the answer stands instead of the default one.
    if "pattern" in values:
        given.pop("preset", None)
    if "preset" in values:
        given.pop("pattern", None)
    return model.from_dict({**given, **values})
