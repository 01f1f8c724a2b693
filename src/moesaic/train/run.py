"""A run: everything that decides what is trained, on what and how, as one YAML file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import model_validator

from moesaic.configuration import Config, apply_overrides, read_yaml
from moesaic.data import DataConfig
from moesaic.dist import ParallelConfig
from moesaic.errors import ConfigError
from moesaic.layer import MoESpec
from moesaic.train.config import TrainConfig


class RunConfig(Config):
    """One training run. Random weights come from `backbone` (and `moe`), trained ones from `initial_model`.

    Attributes:
        backbone: the decoder: a stock config as a dict with `model_type`, or the path of one. In a dict, a missing
            `vocab_size` and missing ids of special tokens are taken from the tokenizer.
        moe: its MoE layers; None trains the backbone as it is, dense.
        initial_model: a saved model (dense or MoE, folder or hub name) whose architecture and weights to start from;
            then `backbone` and `moe` must be absent.
        data: what to train on.
        train: how to train.
        parallel: how to spread it over processes.
    """

    backbone: dict[str, Any] | str | None = None
    moe: MoESpec | None = None
    initial_model: str | None = None
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    parallel: ParallelConfig = ParallelConfig()

    @model_validator(mode="after")
    def _one_origin(self) -> RunConfig:
        if self.initial_model is None and self.backbone is None:
            raise ConfigError("backbone", None, "is required", "give a config with model_type, or initial_model")
        for name in ("backbone", "moe"):
            if self.initial_model is not None and getattr(self, name) is not None:
                raise ConfigError(
                    "initial_model", self.initial_model, f"already says what {name} is", "remove one of the two"
                )
        return self

    @classmethod
    def from_yaml(cls, path: str | Path, overrides: Iterable[str] = ()) -> Self:
        """Read a YAML file, take its relative paths from its folder, and apply `a.b=c` overrides on top.

        Paths in overrides stay relative to the working directory, as a shell user expects.

        Raises:
            ConfigError: if the file is missing, is not a YAML mapping, or a field is invalid.
        """
        path = Path(path)
        values = resolve_paths(read_yaml(path), path.parent.absolute())
        return cls.from_dict(apply_overrides(values, overrides))


def resolve_paths(values: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """`values` of a run with relative paths joined to `folder`.

    Files of text and JSONL sources and of a router's frequencies are always joined. What may also be a hub name (`backbone`, `initial_model`, the
    tokenizer, a dataset) is joined if it begins with a dot or such a file or folder exists.
    """
    resolved = dict(values)
    for name in ("backbone", "initial_model"):
        if isinstance(resolved.get(name), str):
            resolved[name] = _local_or_hub(resolved[name], folder)
    router = resolved["moe"].get("router") if isinstance(resolved.get("moe"), Mapping) else None
    if isinstance(router, Mapping) and router.get("frequencies", "zipf") != "zipf":
        frequencies = _joined(router["frequencies"], folder)
        resolved["moe"] = {**resolved["moe"], "router": {**router, "frequencies": frequencies}}
    data = resolved.get("data")
    if isinstance(data, Mapping):
        data = dict(data)
        if isinstance(data.get("tokenizer"), Mapping):
            data["tokenizer"] = _with_path(data["tokenizer"], folder)
        if isinstance(data.get("sources"), list):
            data["sources"] = [_resolve_source(source, folder) for source in data["sources"]]
        resolved["data"] = data
    return resolved


def _resolve_source(source: Any, folder: Path) -> Any:
    if not isinstance(source, Mapping):
        return source
    source = _with_path(source, folder)
    for name in ("paths", "data_files"):
        if name in source:
            source[name] = _joined(source[name], folder)
    return source


def _with_path(section: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    if isinstance(section.get("path"), str):
        return {**section, "path": _local_or_hub(section["path"], folder)}
    return dict(section)


def _local_or_hub(name: str, folder: Path) -> str:
    return _joined(name, folder) if name.startswith(".") or (folder / name).exists() else name


def _joined(paths: Any, folder: Path) -> Any:
    """A path, a list or a dict of them, joined to `folder`; addresses (`hf://…`) and `~` stay."""
    if isinstance(paths, str):
        return paths if "://" in paths or paths.startswith("~") else str(folder / paths)
    if isinstance(paths, list):
        return [_joined(path, folder) for path in paths]
    if isinstance(paths, Mapping):
        return {split: _joined(path, folder) for split, path in paths.items()}
    return paths
