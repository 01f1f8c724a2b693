"""What is measured, and where it is written: a JSON-lines file, and TensorBoard if asked for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from moesaic.errors import ConfigError, TrainingError
from moesaic.files import write_text
from moesaic.train.evaluate import Evaluation, overall
from moesaic.train.routing_load import over_layers


@dataclass(frozen=True)
class StepMetrics:
    """One optimiser step; a line of type "train" in the metrics file.

    Attributes:
        step: optimiser steps made, this one included.
        tokens: tokens trained on since the start of the run.
        loss: mean cross entropy of a predicted token, in nats, balance losses not included.
        aux_losses: balance losses by name, coefficient included, summed over layers.
        max_violation: by MoE layer, largest expert load over the mean load, minus 1 (0 is balanced), over all tokens
            of the step.
        learning_rate: that of this step.
        gradient_norm: before clipping.
        tokens_per_second: over the wall time of the step.
        drop_rate: share of the picks that a capacity dropped, by MoE layer, where it is not 0.
        null_share: share of the selections that were null experts, by MoE layer, where it is not 0.
        ranks: of a run over several processes, what differs between them; empty for one process.
    """

    step: int
    tokens: int
    loss: float
    aux_losses: dict[str, float]
    max_violation: dict[int, float]
    learning_rate: float
    gradient_norm: float
    tokens_per_second: float
    drop_rate: dict[int, float] = field(default_factory=dict)
    null_share: dict[int, float] = field(default_factory=dict)
    ranks: dict[str, Any] = field(default_factory=dict)

    @property
    def balance(self) -> dict[str, float]:
        """Mean and worst violation over layers and the worst layer; empty for a dense model."""
        return over_layers(self.max_violation)

    def record(self) -> dict[str, Any]:
        """The line of the metrics file; drop rate and null share are there if a layer has one, `ranks` if there are several."""
        optional = {
            "drop_rate": over_layers(self.drop_rate),
            "null_share": over_layers(self.null_share),
            "ranks": self.ranks,
        }
        fields = {name: value for name, value in asdict(self).items() if name not in optional}
        found = {name: value for name, value in optional.items() if value}
        return {"type": "train", **fields, "max_violation": self.balance, **found}


def evaluation_record(step: int, evaluations: Mapping[str, Evaluation]) -> dict[str, Any]:
    """The line of the metrics file for an evaluation after `step`: all domains together, and each."""
    domains = {domain: asdict(evaluation) for domain, evaluation in evaluations.items()}
    return {"type": "evaluation", "step": step, **asdict(overall(evaluations)), "domains": domains}


class MetricsSink(Protocol):
    """Takes records as they come."""

    def write(self, record: Mapping[str, Any]) -> None:
        """Take one record, with at least `type` and `step`."""
        ...

    def close(self) -> None:
        """Nothing more will come."""
        ...


# Experts of all layers together whose loads fit into a line.
_MOST_LOADS = 4096


class MetricsFile:
    """JSON lines, each on disk when `write` returns. Loads of more than 4096 experts are left to TensorBoard.

    Lines after `resumed_step` are dropped at the start, so that after resuming every step is there once.

    Args:
        path: the file; made if missing.
        resumed_step: step at which the run goes on; 0 for a new run.

    Raises:
        TrainingError: if it can't be written.
    """

    def __init__(self, path: Path, resumed_step: int) -> None:
        self.path = path
        kept = [json.dumps(record) + "\n" for record in read_metrics(path) if record["step"] <= resumed_step]
        try:
            write_text(path, "".join(kept))
            self._stream = path.open("a", encoding="utf-8")
        except OSError as error:
            raise self._unwritable(error) from error

    def write(self, record: Mapping[str, Any]) -> None:
        if record["type"] == "routing" and sum(map(len, record["load"])) > _MOST_LOADS:
            record = {name: value for name, value in record.items() if name != "load"}
        try:
            self._stream.write(json.dumps(record) + "\n")
            self._stream.flush()
        except OSError as error:
            raise self._unwritable(error) from error

    def close(self) -> None:
        self._stream.close()

    def _unwritable(self, error: OSError) -> TrainingError:
        return TrainingError(f"cannot write metrics to {self.path}: {error.strerror}; free some space, then resume")


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Records of a metrics file, in order; empty if there is none. A half-written last line is left out."""
    path = Path(path)
    if not path.is_file():
        return []
    whole_lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in whole_lines]


class TensorBoardSink:
    """Every number of a record as a scalar, named by its path (`train/max_violation/worst`).

    Statistics of routing are scalars for each layer (`routing/entropy/layer_3`) and a histogram of the load, whose buckets are
    the experts (`routing/load/layer_3`); an alert is 1 when it starts and 0 when it ends (`alert/layer_3`).

    Args:
        folder: where event files go.
        resumed_step: events after it, of an earlier run in the same folder, are hidden.

    Raises:
        ConfigError: if tensorboard is not installed.
    """

    def __init__(self, folder: Path, resumed_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ConfigError(
                "train.tensorboard",
                True,
                "needs the tensorboard package",
                "install moesaic[train], or set it to false: metrics.jsonl has the same numbers",
            ) from None
        self._writer = SummaryWriter(str(folder), purge_step=resumed_step + 1)

    def write(self, record: Mapping[str, Any]) -> None:
        if record["type"] == "routing":
            self._write_loads(record)
            record = _by_layer(record)
        elif record["type"] == "alert":
            started = float(record["state"] == "started")
            record = {"type": "alert", "step": record["step"], f"layer_{record['layer']}": started}
        for name, value in _scalars(record, record["type"]):
            self._writer.add_scalar(name, value, record["step"])

    def _write_loads(self, record: Mapping[str, Any]) -> None:
        for layer, load in zip(record["layers"], record["load"], strict=True):
            experts = len(load)
            self._writer.add_histogram_raw(
                f"routing/load/layer_{layer}",
                min=0,
                max=experts,
                num=sum(load),
                sum=sum(expert * picks for expert, picks in enumerate(load)),
                sum_squares=sum(expert * expert * picks for expert, picks in enumerate(load)),
                bucket_limits=[expert + 0.5 for expert in range(experts)],
                bucket_counts=list(load),
                global_step=record["step"],
            )

    def close(self) -> None:
        self._writer.close()


def _by_layer(record: Mapping[str, Any]) -> dict[str, Any]:
    """Lists over layers as values by the name of the layer."""
    layers = [f"layer_{layer}" for layer in record["layers"]]
    lists = {
        name: value for name, value in record.items() if isinstance(value, list) and name not in ("layers", "load")
    }
    values = {name: dict(zip(layers, value, strict=True)) for name, value in lists.items()}
    return {"type": record["type"], "step": record["step"], **values}


def _scalars(values: Mapping[str, Any], prefix: str) -> list[tuple[str, float]]:
    found = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            found.extend(_scalars(value, f"{prefix}/{name}"))
        elif isinstance(value, int | float) and name != "step":
            found.append((f"{prefix}/{name}", value))
    return found
