from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from tests.train.builders import tiny_run

from moesaic.train import RunConfig, read_metrics, train
from moesaic.train.signals import StopSignals

TRAIN = """
import sys
from moesaic.configuration import read_yaml
from moesaic.train import RunConfig, train
run = RunConfig.from_dict(read_yaml(sys.argv[1]))
sys.exit(train(run, sys.argv[2], cache_dir=sys.argv[3]).exit_code)
"""


def test_the_first_signal_is_noted_and_handlers_are_restored():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignals() as stop:
        assert stop.received is None
        signal.raise_signal(signal.SIGTERM)
        assert stop.received == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_second_signal_stops_at_once():
    # Where the tests run in the background, SIGINT may be ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with StopSignals():
            signal.raise_signal(signal.SIGTERM)
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_repeat_right_after_the_first_is_the_same_signal():
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with StopSignals(repeat_seconds=0.2) as stop:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)
            assert stop.received == signal.SIGTERM
            time.sleep(0.25)
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_another_thread_leaves_signals_alone():
    seen = []

    def enter() -> None:
        with StopSignals() as stop:
            seen.append(stop.received)

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [None]
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signalled_process_leaves_a_checkpoint_that_resumes(data, corpus, tmp_path, number, exit_code):
    run = tiny_run(data.config, steps=100_000, checkpoint_every=None, eval_every=None, log_every=1000)
    (tmp_path / "run.yaml").write_text(run.to_yaml())
    output = tmp_path / "out"
    command = [sys.executable, "-c", TRAIN, str(tmp_path / "run.yaml"), str(output), str(corpus / "cache")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, env=environment, cwd=Path(__file__).parents[2], stderr=subprocess.PIPE, text=True
    )
    try:
        while len(read_metrics(output / "metrics.jsonl")) < 3:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.05)
        os.kill(process.pid, number)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()

    assert process.returncode == exit_code, errors
    assert "stopped by a signal after step" in errors
    [checkpoint] = (output / "checkpoints").iterdir()
    last = read_metrics(output / "metrics.jsonl")[-1]["step"]
    assert checkpoint.name == f"step-{last:08d}"
    longer = RunConfig.from_dict({**run.to_dict(), "train": {**run.train.to_dict(), "steps": last + 1}})
    assert train(longer, output, resume=True, data=data, progress=False).step == last + 1
