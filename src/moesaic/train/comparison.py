"""An MoE run beside its control: the dense model of equal active width, given the same tokens in the same order."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moesaic.data import PreparedData, prepare_data
from moesaic.errors import ConfigError
from moesaic.train.loop import TrainResult, train
from moesaic.train.run import RunConfig


@dataclass(frozen=True)
class Comparison:
    """Both arms of a comparison; an arm that was interrupted is not finished, and the dense one may be missing.

    Attributes:
        moe: result of the MoE arm.
        dense: result of the dense arm, None if the MoE arm was interrupted.
        data: what both were trained on.
    """

    moe: TrainResult
    dense: TrainResult | None
    data: PreparedData


def dense_control(run: RunConfig) -> RunConfig:
    """The run without `moe`, its feed-forward networks as wide as what a token uses: K * F plus the shared experts.

    Raises:
        ConfigError: if the run has no MoE layers, or its backbone is not given as a dict.
    """
    if run.moe is None:
        raise ConfigError("moe", None, "is required for a comparison", "give a run with MoE layers")
    if not isinstance(run.backbone, dict):
        raise ConfigError("backbone", run.backbone, "must be a dict for a comparison", "write its fields into the file")
    with torch.device("meta"):
        picks = run.moe.router.build(run.moe.experts.intermediate_size, run.moe.experts.num_experts).picks
    width = round(picks * run.moe.experts.intermediate_size) + run.moe.shared_width
    if run.moe.experts.activation == "swiglu_double":
        width = round(width * 4 / 3)  # four matrices, of which backbones have three
    values: dict[str, Any] = run.to_dict() | {"moe": None, "backbone": {**run.backbone, "intermediate_size": width}}
    return RunConfig.from_dict(values)


def compare(run: RunConfig, output_dir: str | Path, *, progress: bool = True) -> Comparison:
    """Train the MoE of `run` into `output_dir`/moe and its dense control into `output_dir`/dense, or resume them.

    Raises:
        The errors of `train`.
    """
    output_dir = Path(output_dir)
    control = dense_control(run)
    data = prepare_data(run.data, output_dir / "data", progress=progress)
    moe = train(run, output_dir / "moe", resume="auto", data=data, progress=progress)
    if not moe.finished:
        return Comparison(moe, None, data)
    return Comparison(moe, train(control, output_dir / "dense", resume="auto", data=data, progress=progress), data)
