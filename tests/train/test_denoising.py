"""Training with UL2, then causal language modelling: exact resumes, causal evaluation, padding that counts nowhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.train.builders import BACKBONE, data_config, tiny_run
from tests.train.test_loop import comparable

from moesaic.data import PreparedData, prepare_data
from moesaic.errors import ConfigError
from moesaic.hf import MoesaicForCausalLM
from moesaic.trace import TraceFile
from moesaic.train import RunConfig, Trainer, build_model, load_model, train
from moesaic.train.model import check_architecture, objective_of

STAGES = {
    "type": "stages",
    "stages": [{"objective": {"type": "ul2"}, "until": 0.75}, {"objective": {"type": "causal_lm"}}],
}
TOKENIZER = {"type": "train_bpe", "vocab_size": 290, "sentinels": 4}


@pytest.fixture(scope="module")
def denoised(corpus) -> PreparedData:
    return prepare_data(data_config(corpus, tokenizer=TOKENIZER, objective=STAGES), corpus / "denoised", progress=False)


def test_a_killed_and_resumed_run_equals_an_uninterrupted_one(denoised, tmp_path, monkeypatch) -> None:
    """Killed among the steps of UL2, and after them."""
    run = tiny_run(denoised.config, accumulation_steps=2)
    whole = train(run, tmp_path / "whole", data=denoised, progress=False)
    step = Trainer.train_step

    def killed_in(number: int) -> Any:
        def train_step(trainer: Trainer) -> Any:
            if trainer.step == number:
                raise InterruptedError
            return step(trainer)

        return train_step

    for number, resume in ((5, False), (7, True)):
        monkeypatch.setattr(Trainer, "train_step", killed_in(number))
        with pytest.raises(InterruptedError):
            train(run, tmp_path / "killed", resume=resume, data=denoised, progress=False)
    monkeypatch.undo()
    resumed = train(run, tmp_path / "killed", resume=True, data=denoised, progress=False)
    assert comparable(resumed.metrics_file) == comparable(whole.metrics_file)
    expected = load_model(whole.checkpoint).state_dict()
    for name, tensor in load_model(resumed.checkpoint).state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_steps_before_the_change_denoise_and_evaluation_never_does(denoised, make_trainer, monkeypatch) -> None:
    seen: list[tuple[bool, bool]] = []
    forward = MoesaicForCausalLM.forward

    def watched(model: Any, **inputs: Any) -> Any:
        causal = torch.equal(inputs["labels"], inputs["input_ids"].masked_fill(inputs["labels"] == -100, -100))
        whole = bool((inputs["labels"][:, 1:-1] != -100).float().mean() > 0.6)
        seen.append((model.training, causal and whole and "attention_mask" not in inputs))
        return forward(model, **inputs)

    monkeypatch.setattr(MoesaicForCausalLM, "forward", watched)
    trainer = make_trainer(tiny_run(denoised.config), denoised)
    for _ in range(8):
        trainer.train_step()
        trainer.evaluate()
    assert [causal for training, causal in seen if training] == [False] * 6 + [True] * 2
    assert all(causal for training, causal in seen if not training)


def test_what_stands_in_padding_changes_nothing(denoised, make_trainer) -> None:
    """Neither cross entropy nor balance losses nor gradients, under a router that drops by capacity too."""
    run = tiny_run(denoised.config, moe={"capacity": {"factor": 1.0, "minimum": 1}})
    results = []
    for fill in (0, 7):
        trainer = make_trainer(run, denoised)
        trainer.objective._fill = fill
        metrics = trainer.train_step()
        results.append((metrics.loss, metrics.aux_losses, metrics.gradient_norm, metrics.max_violation))
    assert results[0] == results[1]


def test_ids_beyond_the_tokenizer_widen_the_model(corpus, data) -> None:
    objective = {"type": "ul2", "reserved_from": 300}
    run = tiny_run(data_config(corpus, objective=objective))
    model = build_model(run, data.tokenizer)
    assert model.config.get_text_config().vocab_size > 300 > len(data.tokenizer)
    narrow = RunConfig.from_dict({**run.to_dict(), "backbone": {**BACKBONE, "vocab_size": 300}})
    with pytest.raises(
        ConfigError, match=r"backbone.vocab_size = 300 is smaller than the \d+ ids of text and data.object"
    ):
        build_model(narrow, data.tokenizer)


def test_stages_that_a_run_does_not_reach_are_refused_before_text_is_read(corpus) -> None:
    stages = [{"objective": {"type": "ul2"}, "until_step": 8}, {"objective": {"type": "causal_lm"}}]
    data = data_config(corpus, tokenizer=TOKENIZER, objective={"type": "stages", "stages": stages})
    with pytest.raises(ConfigError, match=r"data.objective.stages.0.until_step = 8 does not end before the run of 8"):
        check_architecture(tiny_run(data))


def test_traces_leave_padding_out(denoised, tmp_path) -> None:
    run = tiny_run(denoised.config, steps=4, trace={"sample": 1.0})
    train(run, tmp_path, data=denoised, progress=False)
    objective = objective_of(run, denoised.tokenizer)
    batches, real = denoised.train_batches(), 0
    for step in range(4):
        batch = objective.batch(next(batches), step=step, steps=4)
        real += int(batch.get("attention_mask", torch.ones_like(batch["input_ids"])).sum())
    trace = TraceFile(tmp_path / "routing.trace")
    assert sum(len(found.choice_TK) for found in trace.rows()) == real * len(trace.header.layers)
