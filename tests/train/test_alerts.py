"""Live statistics of routing and the alerts that they raise."""

from __future__ import annotations

import io
import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tests.train.builders import tiny_run
from tests.train.test_hf_trainer import moe_model, run_trainer, sequences

from moesaic.errors import ConfigError
from moesaic.layer import LayerLoad
from moesaic.train import AlertsConfig, RoutingMetricsCallback, TrainConfig, Trainer, loop, read_metrics, train
from moesaic.train.alerts import Alert, AlertMonitor, Breach, describe_alerts
from moesaic.train.routing_load import LayerStatistics, statistics_of
from moesaic.train.routing_monitor import RoutingMonitor

STEPS, EVERY = 8, 2


def load(picks: list[int], *, dropped: int = 0, nulls: int = 0) -> LayerLoad:
    load_N = torch.tensor(picks)
    chosen_M = torch.cat([load_N, torch.tensor([nulls])]) if nulls else load_N
    return LayerLoad(chosen_M, load_N, torch.tensor(dropped), torch.tensor(sum(picks)))


def test_statistics_of_a_layer() -> None:
    layers = {3: load([60, 20, 0, 0], dropped=20, nulls=100)}
    found = statistics_of(layers)[3]
    assert found.load == (60, 20, 0, 0)
    assert found.max_violation == pytest.approx(2.0)  # 60 over a mean of 20
    # -(3/4 ln 3/4 + 1/4 ln 1/4) / ln 4
    assert found.entropy == pytest.approx(0.405639, abs=1e-6)
    assert found.unused_share == 0.5
    assert found.drop_rate == pytest.approx(0.2)
    assert found.null_share == pytest.approx(100 / 180)
    assert found.judged
    assert not LayerStatistics.of(load([10, 0, 0, 0])).judged


def statistics(**changes: float) -> LayerStatistics:
    values = {
        "max_violation": 0.1,
        "entropy": 0.99,
        "unused_share": 0.0,
        "drop_rate": 0.0,
        "null_share": 0.0,
        **changes,
    }
    return LayerStatistics(load=(1, 1), judged=bool(values.pop("judged", True)), **values)


@pytest.mark.parametrize(
    ("name", "value"),
    [("entropy", 0.5), ("unused_share", 0.5), ("max_violation", 9.0), ("drop_rate", 0.4), ("null_share", 0.99)],
)
def test_every_threshold_is_read_and_can_be_switched_off(name: str, value: float) -> None:
    beyond = statistics(**{name: value})
    (breach,) = AlertsConfig().breaches(beyond)
    assert (breach.metric, breach.value) == (name, value)
    assert not AlertsConfig.from_dict({name: None}).breaches(beyond)
    assert not AlertsConfig().breaches(statistics())


def test_a_line_when_it_starts_and_one_when_it_ends() -> None:
    monitor = AlertMonitor(AlertsConfig(patience=2))
    fine, bad = statistics(), statistics(entropy=0.3)
    sequence = [fine, bad, fine, bad, bad, bad, bad, fine, bad, fine, fine, fine]
    found = {step: monitor.check(step, {0: fine, 5: each}) for step, each in enumerate(sequence)}
    assert {step: [(alert.layer, alert.state) for alert in alerts] for step, alerts in found.items() if alerts} == {
        4: [(5, "started")],
        10: [(5, "ended")],
    }
    assert found[10][0].since == 4
    assert monitor.alerted == []


def test_few_picks_are_not_judged() -> None:
    monitor = AlertMonitor(AlertsConfig(patience=1))
    assert not monitor.check(1, {0: statistics(entropy=0.0, judged=0.0)})


def test_lines_name_layer_value_threshold_and_help() -> None:
    breaches = (Breach("entropy", 0.33, 0.6), Breach("drop_rate", 0.5, 0.3))
    alerts = [Alert(40, layer, "started", breaches if not layer else breaches[:1]) for layer in range(5)]
    (line,) = describe_alerts(alerts)
    assert line.startswith(
        "ALERT step 40: routing collapses in layer 0: entropy 0.33 < 0.6, drop rate 50% > 30%; layer 1: "
    )
    assert "and 2 more layers (3, 4)" in line
    assert "coefficient of the balance loss" in line
    assert "moe.capacity.factor" in line
    (over,) = describe_alerts([Alert(60, 0, "ended", since=40)])
    assert over == "alert over, step 60: routing has recovered in layer 0 (since step 40)"


def test_thresholds_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"alerts\.entropy"):
        TrainConfig.from_dict({"alerts": {"entropy": 1.5}})
    assert TrainConfig.from_dict({"alerts": None}).alerts is None


def test_no_reports_without_an_interval() -> None:
    monitor = RoutingMonitor(None, AlertsConfig(patience=1))
    monitor.add({0: load([100, 0])})
    assert monitor.report(10) == ([], [])


# --- A training whose router collapses, and recovers ------------------------------------------------------------------


def run_of(data: Any, **settings: Any) -> Any:
    return tiny_run(
        data.config,
        moe={"balance": []},
        steps=STEPS,
        routing_every=EVERY,
        tensorboard=True,
        alerts={"patience": 1},
        **settings,
    )


@pytest.fixture
def collapsing(monkeypatch: pytest.MonkeyPatch) -> _Lines:
    """Steps 3 to 6 send all tokens of layer 1 to experts 0 and 1; what a terminal shows."""
    step, shown = Trainer.train_step, io.StringIO()

    def forced(trainer: Trainer) -> Any:
        gate = trainer.model.moe_blocks()[1].gate  # type: ignore[operator]
        collapsed = 2 <= trainer.step < 6

        def one_way(module: Any, args: Any, output: Any) -> Any:
            if not collapsed:
                return output
            forced_TK = torch.arange(2).expand(output.index_TK.shape).contiguous()
            return replace(output, index_TK=forced_TK)

        handle = gate.register_forward_hook(one_way)
        try:
            return step(trainer)
        finally:
            handle.remove()

    monkeypatch.setattr(Trainer, "train_step", forced)
    display = loop.progress_display
    monkeypatch.setattr(
        loop,
        "progress_display",
        lambda steps, first, every: display(steps, first, every, Console(file=shown, width=400)),
    )
    return _Lines(shown)


class _Lines:
    def __init__(self, stream: io.StringIO) -> None:
        self._stream = stream

    def starting(self, word: str) -> list[str]:
        return [line for line in self._stream.getvalue().splitlines() if line.startswith(word)]


def test_a_run_tells_of_a_collapse_and_of_the_recovery(data: Any, tmp_path: Any, collapsing: Any) -> None:
    train(run_of(data, log_every=1), tmp_path, data=data)
    (alert,) = collapsing.starting("ALERT")
    assert alert.startswith("ALERT step 4: routing collapses in layer 1: entropy 0.50 < 0.6, unused share 50% > 25%.")
    (over,) = collapsing.starting("alert over")
    assert over == "alert over, step 8: routing has recovered in layer 1 (since step 4)"
    assert "balance 1.00 (layer 1)" in collapsing.starting("step 5/8")[0]

    records = read_metrics(tmp_path / "metrics.jsonl")
    reports = [record for record in records if record["type"] == "routing"]
    assert [record["step"] for record in reports] == [2, 4, 6, 8]
    for record in reports:
        assert record["layers"] == [0, 1]
        for place in range(2):
            tokens = EVERY * 4 * 32
            assert sum(record["load"][place]) == 2 * tokens
    assert [record["entropy"][1] == 0.5 for record in reports] == [False, True, True, False]
    alerts = [record for record in records if record["type"] == "alert"]
    assert [(record["step"], record["layer"], record["state"]) for record in alerts] == [
        (4, 1, "started"),
        (8, 1, "ended"),
    ]
    assert alerts[0]["breaches"][0] == {"metric": "entropy", "value": 0.5, "threshold": 0.6}

    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"histograms": 0})
    events.Reload()
    assert [event.value for event in events.Scalars("routing/unused_share/layer_1")] == [
        record["unused_share"][1] for record in reports
    ]
    assert [(event.step, event.value) for event in events.Scalars("alert/layer_1")] == [(4, 1.0), (8, 0.0)]
    histogram = events.Histograms("routing/load/layer_1")[1].histogram_value
    assert list(histogram.bucket) == reports[1]["load"][1]


def test_a_resumed_run_goes_on_with_loads_and_alerts(data: Any, tmp_path: Any, collapsing: Any) -> None:
    settings = {"checkpoint_every": 5}
    train(run_of(data, **settings), tmp_path / "whole", data=data, progress=False)
    # Killed after step 5: in the middle of an interval, and of an alert.
    save = Trainer.save

    def stop_after_five(trainer: Trainer) -> Any:
        path = save(trainer)
        if trainer.step == 5:
            raise InterruptedError
        return path

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "save", stop_after_five)
        with pytest.raises(InterruptedError):
            train(run_of(data, **settings), tmp_path / "killed", data=data, progress=False)
    train(run_of(data, **settings), tmp_path / "killed", resume=True, data=data, progress=False)
    whole, resumed = (
        [record for record in read_metrics(tmp_path / name / "metrics.jsonl") if record["type"] in ("routing", "alert")]
        for name in ("whole", "killed")
    )
    assert resumed == whole


def test_hf_trainer_logs_statistics_and_alerts(tmp_path: Any, caplog: pytest.LogCaptureFixture) -> None:
    model = moe_model(0.0)
    gate = model.moe_blocks()[0].gate
    gate.get_parameter("weight").data.zero_()  # ties go to experts 0 and 1
    gate.requires_grad_(False)
    callback = RoutingMetricsCallback(AlertsConfig(patience=2))
    with caplog.at_level(logging.WARNING, "moesaic"):
        trainer = run_trainer(model, sequences(16, equal=False), tmp_path, [callback], batch_size=4, steps=4)
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert all(log["entropy/layer_0"] == pytest.approx(0.5) for log in logs)
    assert all(log["unused_share/layer_0"] == 0.5 for log in logs)
    assert [log.get("alert/layer_0") for log in logs] == [None, 1.0, None, None]
    assert sum("ALERT step 2" in message for message in caplog.messages) == 1
