"""Finding and reading presets."""

from __future__ import annotations

import difflib
from importlib import resources

from moesaic.catalog.schema import Preset
from moesaic.configuration import read_yaml
from moesaic.errors import ConfigError

_DATA = resources.files("moesaic.catalog") / "data"
_SUFFIX = ".yaml"


def presets() -> tuple[str, ...]:
    """Names of all presets, in alphabetical order."""
    return tuple(sorted(file.name.removesuffix(_SUFFIX) for file in _DATA.iterdir() if file.name.endswith(_SUFFIX)))


def preset(name: str) -> Preset:
    """The preset called `name`.

    Example:
        ```python
        found = moesaic.preset("deepseekmoe-16b")
        model = moesaic.build(found.backbone, found.moe)
        ```

    Raises:
        ConfigError: if there is none of that name, with the names that come close.
    """
    known = presets()
    if name not in known:
        close = difflib.get_close_matches(str(name).lower(), known, n=3)
        hint = f"did you mean {' or '.join(map(repr, close))}? " if close else ""
        raise ConfigError("preset", name, "is not a preset", f"{hint}known are {', '.join(known)}")
    with resources.as_file(_DATA / f"{name}{_SUFFIX}") as path:
        return Preset.from_dict({"name": name, **read_yaml(path)}, where=name)
