"""The experiments by name."""

from __future__ import annotations

import difflib

from moesaic.errors import ConfigError
from moesaic.papers import adamoe, deepseekmoe, gates, openmoe, rmoe, scmoe
from moesaic.papers.experiment import Experiment

EXPERIMENTS: dict[str, Experiment] = {
    module.EXPERIMENT.name: module.EXPERIMENT for module in (deepseekmoe, adamoe, rmoe, gates, openmoe, scmoe)
}


def experiment_named(name: str) -> Experiment:
    """The experiment of that name.

    Raises:
        ConfigError: if there is none.
    """
    if name not in EXPERIMENTS:
        close = difflib.get_close_matches(name, EXPERIMENTS, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ConfigError("name", name, "is not a reproduction", f"{hint}there are: {', '.join(EXPERIMENTS)}")
    return EXPERIMENTS[name]
