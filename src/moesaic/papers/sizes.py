"""The sizes of an experiment: a YAML file each, beside its code, with the common run and what each arm changes in it.

about: one line: model, data and tokens of an arm
run:   {backbone: ..., moe: ..., data: ..., train: ...}      as for `moesaic train`
arms:
  NAME: {moe: {...}, train: {...}}                           merged into it; null removes a section
  NAME: {fork: {...}, train: {...}}                          starts from its parent's checkpoint
  NAME: {measure: {...}}                                     options of the experiment's measurements
  NAME: {checkpoint: {path: ...}}                            a model that a user brings, with nothing to train
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import yaml

from moesaic.configuration import apply_overrides
from moesaic.errors import ConfigError
from moesaic.papers.experiment import Experiment
from moesaic.papers.given import GivenModel
from moesaic.train import RunConfig


@dataclass(frozen=True)
class SizedArm:
    """An arm of an experiment at one size.

    Attributes:
        name: of the arm.
        values: its run as a plain dict; that of a forked arm has no `backbone` and `moe`.
        fork: what its fork is told.
        measure: options of its measurements.
        checkpoint: the model that a user brings, in place of a run; None for an arm that is trained.
    """

    name: str
    values: dict[str, Any]
    fork: dict[str, Any]
    measure: dict[str, Any] = field(default_factory=dict)
    checkpoint: dict[str, Any] | None = None

    @property
    def given(self) -> GivenModel | None:
        """The model that a user brings; None for an arm that is trained.

        Raises:
            ConfigError: if a field is invalid.
        """
        return None if self.checkpoint is None else GivenModel.from_dict(self.checkpoint, where="checkpoint")

    def run(self, seed: int, initial: Path | None = None) -> RunConfig:
        """The run of one seed, which decides initial weights and the order of the data.

        Args:
            seed: added to the seeds of the file, so that a later stage may see the data in another order than the first.
            initial: model to start from, for a forked arm.

        Raises:
            ConfigError: if a field is invalid; it names the arm.
        """
        values = {
            name: dict(section) if isinstance(section, Mapping) else section for name, section in self.values.items()
        }
        for section in ("train", "data"):
            values[section] = {**values.get(section, {})}
            values[section]["seed"] = values[section].get("seed", 0) + seed
        if initial is not None:
            values["initial_model"] = str(initial)
        try:
            return RunConfig.from_dict(values)
        except ConfigError as error:
            raise ConfigError(f"arms.{self.name}.{error.field}", error.value, error.problem, error.remedy) from None


def size_names(experiment: Experiment) -> tuple[str, ...]:
    """Sizes that an experiment comes in."""
    names = [file.name.split(".") for file in _folder(experiment).iterdir()]
    return tuple(sorted(name[1] for name in names if len(name) == 3 and name[::2] == [experiment.name, "yaml"]))


def read_size(experiment: Experiment, size: str) -> dict[str, Any]:
    """The YAML file of a size.

    Raises:
        ConfigError: if there is no such size.
    """
    names = size_names(experiment)
    if size not in names:
        raise ConfigError("--size", size, f"is not a size of {experiment.name}", f"choose one of {', '.join(names)}")
    return yaml.safe_load(_folder(experiment).joinpath(f"{experiment.name}.{size}.yaml").read_text(encoding="utf-8"))


def _folder(experiment: Experiment) -> Traversable:
    return resources.files(experiment.module.rpartition(".")[0])


def arms_of(experiment: Experiment, size: str, overrides: Iterable[str] = ()) -> dict[str, SizedArm]:
    """The arms of a size, in the experiment's order.

    Args:
        experiment: which.
        size: which of its sizes.
        overrides: `a.b=c`: a field of the run of every arm; `arms.NAME.a.b=c`: of one arm,
            with `arms.NAME.fork.a=c` for its fork. `measure.a=c` and `checkpoint.a=c` set those sections. Overrides of `moe` and
            `backbone` leave arms that lack the section as they are.

    Raises:
        ConfigError: if there is no such size, arm or field.
    """
    content = read_size(experiment, size)
    common, own = _split(experiment, content["arms"], overrides)
    arms = {}
    for name, arm in experiment.arms.items():
        if name not in content["arms"]:
            continue
        patch = dict(content["arms"][name] or {})
        values = _merged(content["run"], patch)
        if arm.parent is not None:
            values.pop("backbone", None)
            values.pop("moe", None)
        trains = "checkpoint" not in values
        applying = [override for override in common if _applies(override, values)]
        values = apply_overrides(values, [*applying, *own.get(name, ())])
        fork = values.pop("fork", None) or {} if arm.parent is not None else {}
        measure, checkpoint = values.pop("measure", None) or {}, values.pop("checkpoint", None)
        if checkpoint is not None and trains:
            raise ConfigError("checkpoint", checkpoint, f"does not go with size {size}, which trains", "leave it out")
        if checkpoint is not None and (left := sorted(values)):
            raise ConfigError("--set", left[0], "is part of a run, and this size trains nothing", "leave it out")
        arms[name] = SizedArm(name, values, fork, measure, checkpoint)
    return arms


def _split(
    experiment: Experiment, names: Iterable[str], overrides: Iterable[str]
) -> tuple[list[str], dict[str, list[str]]]:
    """Overrides of all arms, and those of single ones."""
    common: list[str] = []
    own: dict[str, list[str]] = {}
    for override in overrides:
        if not override.startswith("arms."):
            common.append(override)
            continue
        name, _, rest = override.removeprefix("arms.").partition(".")
        if name not in names:
            raise ConfigError("--set", override, f"names no arm of {experiment.name}", f"arms: {', '.join(names)}")
        own.setdefault(name, []).append(rest)
    return common, own


def _applies(override: str, values: Mapping[str, Any]) -> bool:
    section = override.partition("=")[0].strip().split(".")[0]
    return section not in ("moe", "backbone") or values.get(section) is not None


def _merged(base: Any, patch: Any) -> Any:
    """`patch` over `base`, mappings merged key by key, everything else replaced."""
    if not isinstance(base, Mapping) or not isinstance(patch, Mapping):
        return patch
    if "type" in patch and patch["type"] != base.get("type"):
        return dict(patch)  # another kind of thing: fields of the first do not belong to it
    return {**base, **{name: _merged(base.get(name), value) for name, value in patch.items()}}
