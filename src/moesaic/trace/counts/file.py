"""`RoutingCounts` as a file: one `.npz` archive of the tensors, with everything else as JSON inside."""

from __future__ import annotations

import json
import zipfile
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moesaic.errors import ConfigError, TraceError
from moesaic.files import atomic_file
from moesaic.trace.counts.groups import DropCounts, GroupCounts
from moesaic.trace.counts.routing import LayerCounts, RoutingCounts
from moesaic.trace.header import TraceHeader

VERSION = 1
_FACTS = "facts"
_CLASSES = {kind.__name__: kind for kind in (LayerCounts, GroupCounts, DropCounts)}


def save_counts(counts: RoutingCounts, path: str | Path) -> None:
    """Write counts as one `.npz` archive, whole or not at all.

    Args:
        counts: of `count`.
        path: ends in `.npz`.

    Raises:
        ConfigError: if `path` has another ending.
    """
    path = Path(path)
    if path.suffix != ".npz":
        raise ConfigError("path", str(path), "does not end in .npz", "name the file NAME.npz")
    arrays: dict[str, np.ndarray] = {}
    facts = {
        "version": VERSION,
        "header": counts.header.to_dict(),
        "layers": {str(index): _packed(layer, f"layer{index}", arrays) for index, layer in counts.layers.items()},
        "flow": [[*pair, _packed(flow, f"flow{pair[0]}-{pair[1]}", arrays)] for pair, flow in counts.flow.items()],
        "tables": sorted(counts.tables),
        "blocks": counts.blocks,
        "documents": counts.documents,
        "excluded": sorted(counts.excluded),
    }
    with atomic_file(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **{_FACTS: np.array(json.dumps(facts)), **arrays})  # pyright: ignore[reportArgumentType]


def load_counts(path: str | Path) -> RoutingCounts:
    """Read what `save_counts` wrote.

    Raises:
        TraceError: if the file is missing, damaged, holds something else, or is of a newer version.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            facts = json.loads(str(archive[_FACTS]))
            if facts["version"] > VERSION:
                raise TraceError(f"{path}: counts of version {facts['version']}; this moesaic reads up to {VERSION}")
            return RoutingCounts(
                header=TraceHeader.from_dict(facts["header"]),
                layers={int(index): _unpacked(layer, archive) for index, layer in facts["layers"].items()},
                flow={(a, b): _unpacked(flow, archive) for a, b, flow in facts["flow"]},
                tables=frozenset(facts["tables"]),
                blocks=facts["blocks"],
                documents=facts["documents"],
                excluded=frozenset(facts["excluded"]),
            )
    except TraceError:
        raise
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise TraceError(f"{path}: no counts can be read from it ({error}); write it with save_counts") from None


def _packed(value: Any, name: str, arrays: dict[str, np.ndarray]) -> Any:
    """JSON of a value; tensors go to `arrays` and leave their name."""
    if isinstance(value, Tensor):
        arrays[name] = value.numpy()
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": {key: _packed(inner, f"{name}.{key}", arrays) for key, inner in value.items()}}
    if is_dataclass(value) and not isinstance(value, type):
        inner = {
            field.name: _packed(getattr(value, field.name), f"{name}.{field.name}", arrays) for field in fields(value)
        }
        return {"class": type(value).__name__, "fields": inner}
    return value


def _unpacked(value: Any, archive: Any) -> Any:
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return torch.from_numpy(archive[value["tensor"]])
    if "dict" in value:
        return {key: _unpacked(inner, archive) for key, inner in value["dict"].items()}
    return _CLASSES[value["class"]](**{key: _unpacked(inner, archive) for key, inner in value["fields"].items()})
