from __future__ import annotations

import errno
import sys

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from moesaic.errors import ConfigError, TrainingError
from moesaic.train import Evaluation, StepMetrics, read_metrics
from moesaic.train.metrics import MetricsFile, TensorBoardSink, evaluation_record


def step_metrics(step: int) -> StepMetrics:
    return StepMetrics(step, 10 * step, 2.5, {"z_loss": 0.1}, {0: 0.5, 3: 1.5}, 1e-3, 0.7, 100.0)


def test_a_step_reports_mean_and_worst_violation():
    assert step_metrics(1).record() == {
        "type": "train",
        "step": 1,
        "tokens": 10,
        "loss": 2.5,
        "aux_losses": {"z_loss": 0.1},
        "max_violation": {"mean": 1.0, "worst": 1.5, "worst_layer": 3},
        "learning_rate": 1e-3,
        "gradient_norm": 0.7,
        "tokens_per_second": 100.0,
    }


def test_a_step_reports_drops_and_null_experts_where_there_are_any():
    metrics = StepMetrics(1, 10, 2.5, {}, {0: 0.5, 3: 1.5}, 1e-3, 0.7, 100.0, {3: 0.25}, {0: 0.5, 3: 0.25})
    assert metrics.record()["drop_rate"] == {"mean": 0.25, "worst": 0.25, "worst_layer": 3}
    assert metrics.record()["null_share"] == {"mean": 0.375, "worst": 0.5, "worst_layer": 0}


def test_a_resumed_file_drops_later_steps_and_a_half_written_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    sink = MetricsFile(path, 0)
    for step in range(1, 6):
        sink.write(step_metrics(step).record())
    sink.close()
    with path.open("a") as stream:
        stream.write('{"type": "tra')

    sink = MetricsFile(path, 3)
    sink.write(step_metrics(4).record())
    sink.close()

    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3, 4]


def test_a_new_run_starts_an_empty_file(tmp_path):
    for _ in range(2):
        sink = MetricsFile(tmp_path / "metrics.jsonl", 0)
        sink.write(step_metrics(1).record())
        sink.close()
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1


def test_a_full_disk_is_reported_readably(tmp_path, monkeypatch):
    sink = MetricsFile(tmp_path / "metrics.jsonl", 0)

    class FullDisk:
        def write(self, text: str) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sink, "_stream", FullDisk())
    with pytest.raises(TrainingError, match=r"cannot write metrics to .*metrics\.jsonl: No space left on device"):
        sink.write({"type": "train", "step": 1})


def test_tensorboard_gets_every_number_by_its_path(tmp_path):
    sink = TensorBoardSink(tmp_path, 0)
    sink.write(step_metrics(1).record())
    sink.write(evaluation_record(1, {"code": Evaluation(1.0, 2.7, 5)}))
    sink.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert set(events.Tags()["scalars"]) >= {
        "train/loss",
        "train/aux_losses/z_loss",
        "train/max_violation/worst",
        "evaluation/loss",
        "evaluation/domains/code/perplexity",
    }
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 2.5)]


def test_missing_tensorboard_is_named_with_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match=r"train\.tensorboard = True needs the tensorboard package; install moesaic"):
        TensorBoardSink(tmp_path, 0)
