"""Typed configuration: pydantic models, YAML files, `a.b=c` overrides, and errors that name the field.

Every configurable part of moesaic derives its config from `Config`: unknown keys are refused, values are checked when
the object is made, and `to_dict` / `from_dict` round-trip through JSON and YAML.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from moesaic.errors import ConfigError

# The safe loader in C, ten times as fast, where PyYAML was built with it.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

# What pydantic says in the words of Python, in those of YAML.
_SHAPES = {
    "model_type": "write `key: value` pairs in its place",
    "model_attributes_type": "write `key: value` pairs in its place, `type` among them",
    "tuple_type": "write a list in its place",
}


class Config(BaseModel):
    """Base of all configuration objects: immutable, keyword only, no unknown keys, no infinite numbers or NaN."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False, protected_namespaces=()
    )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, where: str = "") -> Self:
        """Validate `values`.

        Args:
            values: plain dict as read from YAML or JSON.
            where: path put before field names in errors, e.g. `moe`.

        Raises:
            ConfigError: for the first invalid field.
        """
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            raise _readable(error, cls, where) from None

    @classmethod
    def from_yaml(cls, path: str | Path, overrides: Iterable[str] = ()) -> Self:
        """Read a YAML file and apply `a.b=c` overrides on top.

        Raises:
            ConfigError: if the file is missing, is not a YAML mapping, or a field is invalid.
        """
        return cls.from_dict(apply_overrides(read_yaml(path), overrides))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able dict; `from_dict` of it gives an equal object."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        """The same as YAML text."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read one YAML mapping.

    Raises:
        ConfigError: if there is no such file, or it is not UTF-8 YAML that holds a mapping.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError("config", str(path), "is not a file", "give the path of a YAML file")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_LOADER)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        at = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ConfigError(
            "config", str(path), f"is not valid YAML ({at}{error.problem})", "correct that line"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(
            "config", str(path), f"is not valid YAML ({' '.join(str(error).split())})", "give a UTF-8 text file"
        ) from None
    if not isinstance(values, dict):
        raise ConfigError("config", str(path), "does not hold a mapping", "write `key: value` lines at the top level")
    return values


def apply_overrides(values: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Return `values` with each `a.b=c` set; the right side is read as YAML (`3`, `true`, `[1, 2]`, `null`).

    Raises:
        ConfigError: if an override has no `=`, its right side is not YAML, or its path runs through something that is
            not a mapping.
    """
    result = _copy(values)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key.strip():
            raise ConfigError("--set", override, "has no `=`", "write it as a.b=value")
        node: Any = result
        *parents, last = key.strip().split(".")
        for depth, part in enumerate(parents):
            node = node.setdefault(part, {}) if isinstance(node, dict) else _element(node, part, override)
            if node is None or not isinstance(node, dict | list):
                path = ".".join(parents[: depth + 1])
                raise ConfigError("--set", override, f"goes through {path}, which is not a mapping", "check the path")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            raise ConfigError(
                "--set", override, "has a right side that is not YAML", "put it in quotes to set a string"
            ) from None
        if isinstance(node, list):
            node[_index(node, last, override)] = value
        else:
            node[last] = value
    return result


def _copy(values: Any) -> Any:
    if isinstance(values, Mapping):
        return {key: _copy(value) for key, value in values.items()}
    if isinstance(values, list):
        return [_copy(value) for value in values]
    return values


def _index(node: list, part: str, override: str) -> int:
    if not part.isdecimal() or int(part) >= len(node):
        raise ConfigError("--set", override, f"needs a list index where it says {part!r}", f"use 0 to {len(node) - 1}")
    return int(part)


def _element(node: list, part: str, override: str) -> Any:
    return node[_index(node, part, override)]


def _readable(error: ValidationError, model: type[BaseModel], where: str) -> ConfigError:
    """The most telling problem of a pydantic error as a `ConfigError` with the field's path, its value and a remedy."""
    # A ConfigError raised inside a validator already says everything but where it stands.
    for detail in error.errors():
        inner = detail.get("ctx", {}).get("error")
        if isinstance(inner, ConfigError):
            steps = _walk(model, detail["loc"])[0]
            if steps and inner.field.split(".")[0] == steps[-1]:
                steps.pop()  # it says itself where it stands
            field = ".".join(filter(None, [where, *steps, inner.field]))
            return ConfigError(field, inner.value, inner.problem, inner.remedy)
    # An unknown key before a missing one: mostly it is the missing one, misspelt.
    detail = min(error.errors(), key=lambda found: found["type"] != "extra_forbidden")
    context, value = detail.get("ctx", {}), detail.get("input")
    steps, _ = _walk(model, detail["loc"])
    field = ".".join(filter(None, [where, *steps])) or model.__name__
    match detail["type"]:
        case "extra_forbidden":
            _, parent = _walk(model, detail["loc"][:-1])
            known = sorted({name for found in _models(parent) for name in found.model_fields})
            close = difflib.get_close_matches(str(detail["loc"][-1]), known, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            return ConfigError(field, value, "is not a known key", f"{hint}known here: {', '.join(known)}")
        case "missing":
            return ConfigError(field, None, "is required", "set it")
        case "union_tag_invalid":
            tags = context["expected_tags"]
            return ConfigError(f"{field}.type", context["tag"], "is not one of the choices", f"choose one of {tags}")
        case "union_tag_not_found":
            return ConfigError(
                f"{field}.type", None, "is required", "set it to choose one of the kinds of this section"
            )
        case "literal_error":
            return ConfigError(field, value, "is not one of the choices", f"choose one of {context['expected']}")
    if detail["type"] in _SHAPES:
        return ConfigError(field, value, "is not valid", _SHAPES[detail["type"]])
    message = detail["msg"][0].lower() + detail["msg"][1:]
    return ConfigError(field, value, "is not valid", message)


def _walk(model: type[BaseModel], loc: tuple[int | str, ...]) -> tuple[list[str], Any]:
    """Follow a pydantic location: its steps without union tags, and the annotation it ends at."""
    steps, node = [], model
    for step in loc:
        if str(step).startswith("<") or "[" in str(step):  # tag of a union that is not told apart by `type`
            continue
        found = {str(member.model_fields["type"].default): member for member in _models(node) if _is_tagged(member)}
        if step in found and len(found) > 1:
            node = found[str(step)]
            continue
        steps.append(str(step))
        fields = {name: info.annotation for member in _models(node) for name, info in member.model_fields.items()}
        node = fields.get(str(step), node)
    return steps, node


def _is_tagged(model: type[BaseModel]) -> bool:
    return "type" in model.model_fields


def _models(annotation: Any) -> list[type[BaseModel]]:
    """All pydantic models inside an annotation (optional, union, list, annotated)."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in getattr(annotation, "__args__", ()) for model in _models(part)]
