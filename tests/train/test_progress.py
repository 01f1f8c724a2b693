from __future__ import annotations

import io

from rich.console import Console

from moesaic.train import Evaluation, StepMetrics
from moesaic.train.progress import LiveProgress, PlainProgress, describe_evaluation, describe_step, progress_display


def step_metrics(step: int, **changes) -> StepMetrics:
    values = {
        "step": step,
        "tokens": 10 * step,
        "loss": 2.5,
        "aux_losses": {},
        "max_violation": {0: 0.5, 1: 1.5},
        "learning_rate": 1e-3,
        "gradient_norm": 0.7,
        "tokens_per_second": 12345.6,
    }
    return StepMetrics(**{**values, **changes})


def test_plain_output_is_a_line_every_few_steps_and_after_the_last():
    stream = io.StringIO()
    display = progress_display(25, 0, log_every=10, console=Console(file=stream))
    assert isinstance(display, PlainProgress)
    for step in range(1, 26):
        display.step(step_metrics(step))
    display.close()
    lines = stream.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["10/25", "20/25", "25/25"]
    assert "loss 2.500  balance 1.50 (layer 1)  12,346 tokens/s" in lines[0]
    assert lines[-1].endswith("0:00:00 left")


def test_a_terminal_gets_a_live_bar():
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=160)
    display = progress_display(20, 5, log_every=10, console=console)
    assert isinstance(display, LiveProgress)
    display.step(step_metrics(6))
    display.note("step 6: [validation]")
    display.close()
    text = stream.getvalue()
    assert "6/20" in text
    assert "loss 2.500  balance 1.50" in text
    assert "step 6: [validation]" in text


def test_a_dense_model_has_no_balance():
    stream = io.StringIO()
    display = progress_display(1, 0, log_every=1, console=Console(file=stream))
    display.step(step_metrics(1, max_violation={}))
    assert "balance" not in stream.getvalue()


def test_an_evaluation_names_domains():
    text = describe_evaluation(7, {"prose": Evaluation(1.0, 2.718, 10), "code": Evaluation(2.0, 7.389, 10)})
    assert text == "step 7: validation loss 1.500: prose 1.000 (ppl 2.72), code 2.000 (ppl 7.39)"


def test_drops_and_null_experts_are_shown_where_there_are_any():
    assert describe_step(step_metrics(1, drop_rate={0: 0.01, 1: 0.25}, null_share={0: 0.5})) == (
        "loss 2.500  balance 1.50 (layer 1)  dropped 25.0% (layer 1)  null 50.0% (layer 0)  12,346 tokens/s"
    )
