from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from tests.train.builders import DOMAINS, MOVING_BALANCE, STABLE, data_config, tiny_run
from torch import Tensor

from moesaic.errors import TrainingError
from moesaic.train import Trainer, load_model, read_metrics, train


def comparable(path) -> list[dict]:
    """Metrics without what depends on the clock."""
    return [{**record, "tokens_per_second": None} for record in read_metrics(path)]


@pytest.mark.parametrize(
    ("moe", "settings"),
    [
        (True, {}),
        (False, {}),
        (True, {"precision": "bf16", "accumulation_steps": 2, "schedule": {"type": "wsd"}}),
        (MOVING_BALANCE, {"accumulation_steps": 2}),
        ({"router": {"type": "null_experts", "top_k": 3, "num_null": 4}}, {}),
        ({"router": {"type": "recurrent", "top_k": 2, "state_size": 8}}, {"gradient_checkpointing": True}),
        ({"router": {"type": "dense_to_sparse", "threshold": 0.1}}, {"gradient_checkpointing": True}),
        (STABLE, {"accumulation_steps": 2}),
    ],
)
def test_a_killed_and_resumed_run_equals_an_uninterrupted_one_bit_for_bit(data, tmp_path, monkeypatch, moe, settings):
    # With dropout, this is only so if each step draws the same random numbers again.
    run = tiny_run(data.config, moe=moe, dropout=0.1, **settings)
    whole = train(run, tmp_path / "whole", data=data, progress=False)

    step = Trainer.train_step

    def killed_in_step_7(trainer: Trainer):
        if trainer.step == 6:
            raise InterruptedError
        return step(trainer)

    monkeypatch.setattr(Trainer, "train_step", killed_in_step_7)
    with pytest.raises(InterruptedError):
        train(run, tmp_path / "killed", data=data, progress=False)
    monkeypatch.undo()
    resumed = train(run, tmp_path / "killed", resume=True, data=data, progress=False)

    assert comparable(resumed.metrics_file) == comparable(whole.metrics_file)
    assert [record["step"] for record in read_metrics(whole.metrics_file) if record["type"] == "train"] == [
        *range(1, 9)
    ]
    assert resumed.validation == whole.validation
    expected = load_model(whole.checkpoint).state_dict()
    assert all(
        torch.equal(tensor, expected[name]) for name, tensor in load_model(resumed.checkpoint).state_dict().items()
    )


@pytest.mark.parametrize(
    ("router", "buffer", "values"),
    [
        ({"type": "dense_to_sparse", "temperature": {"start": 1.6, "end": 0.8}}, "temperature", [1.5, 1.2, 0.8]),
        ({"type": "scheduled_top_k", "top_k": {"start": 1, "end": 4}, "frozen": True}, "current_top_k", [1, 3, 4]),
    ],
)
def test_routers_follow_their_schedule(make_trainer, data, router, buffer, values):
    """After steps 1, 4 and 8 of 8."""
    trainer = make_trainer(tiny_run(data.config, moe={"router": router, "balance": []}))
    gates = [block.gate for block in trainer.model.moe_blocks().values()]
    found = []
    for _ in range(8):
        trainer.train_step()
        found.append([getattr(gate, buffer).item() for gate in gates])
    assert [found[step - 1] for step in (1, 4, 8)] == [pytest.approx([value] * len(gates)) for value in values]


def test_stable_routing_is_learned_then_frozen(make_trainer, data):
    trainer = make_trainer(tiny_run(data.config, moe=STABLE))
    gates = [block.gate for block in trainer.model.moe_blocks().values()]
    losses, tables = [], []
    for _ in range(8):
        losses.append(trainer.train_step().aux_losses["distillation"])
        tables.append([gate.expert_of_token.clone() for gate in gates])
    assert all(loss > 0 for loss in losses[:4])
    assert losses[4:] == [0.0] * 4
    for layer in range(len(gates)):
        assert (tables[2][layer] == -1).all()
        assert (tables[3][layer] >= 0).all()
        assert torch.equal(tables[3][layer], tables[7][layer])
    assert not torch.equal(tables[3][0], tables[3][1])  # each layer distils its own


def test_auto_starts_then_finds_nothing_left_to_do(data, tmp_path):
    run = tiny_run(data.config)
    first = train(run, tmp_path, resume="auto", data=data, progress=False)
    again = train(run, tmp_path, resume="auto", data=data, progress=False)
    assert first.finished
    assert again.finished
    assert (again.step, again.tokens, again.checkpoint) == (first.step, first.tokens, first.checkpoint)
    assert again.validation == first.validation
    assert again.tokens_per_second == 0
    assert again.exit_code == 0


def test_data_is_prepared_from_the_run_when_not_given(corpus, tmp_path):
    run = tiny_run(data_config(corpus), steps=1)
    result = train(run, tmp_path, cache_dir=corpus / "cache", progress=False)
    assert set(result.validation) == set(DOMAINS)
    assert (tmp_path / "run.yaml").read_text() == run.to_yaml()


@pytest.mark.parametrize("moe", [True, False])
def test_the_model_learns_a_repetitive_corpus(data, tmp_path, moe):
    schedule = {"type": "wsd", "warmup_steps": 5}
    run = tiny_run(data.config, moe=moe, steps=60, learning_rate=1e-2, schedule=schedule, eval_every=None)
    result = train(run, tmp_path, data=data, progress=False)
    losses = [record["loss"] for record in read_metrics(result.metrics_file) if record["type"] == "train"]
    assert losses[0] == pytest.approx(math.log(len(data.tokenizer)), abs=0.3)
    assert losses[-1] < losses[0] - 2
    assert all(evaluation.loss < losses[0] - 2 for evaluation in result.validation.values())


def gradients_of_a_step(trainer: Trainer) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of the next step, as the optimiser sees them."""
    found: dict[str, Tensor] = {}

    def keep(optimizer, args, kwargs) -> None:
        found.update({name: p.grad.clone() for name, p in trainer.model.named_parameters()})

    trainer.optimizer.register_step_pre_hook(keep)
    metrics = trainer.train_step()
    return metrics.loss + sum(metrics.aux_losses.values()), found


@pytest.mark.parametrize("moe", [True, False])
def test_four_batches_of_one_equal_one_of_four(data, make_trainer, moe):
    found = []
    for accumulation, size in ((4, 1), (1, 4)):
        config = type(data.config).from_dict({**data.config.to_dict(), "batch_size": size})
        run = tiny_run(config, moe=moe, accumulation_steps=accumulation, gradient_clip=None)
        found.append(gradients_of_a_step(make_trainer(run, replace(data, config=config))))
    (split_loss, split), (whole_loss, whole) = found
    assert split_loss == pytest.approx(whole_loss, abs=1e-6)
    torch.testing.assert_close(split, whole, rtol=1e-4, atol=1e-6)


def test_gradient_checkpointing_changes_no_number(data, make_trainer):
    plain = gradients_of_a_step(make_trainer(tiny_run(data.config)))
    recomputed = gradients_of_a_step(make_trainer(tiny_run(data.config, gradient_checkpointing=True)))
    torch.testing.assert_close(recomputed, plain)


def test_bf16_computes_in_bfloat16_and_keeps_float32_weights(data, make_trainer):
    trainer = make_trainer(tiny_run(data.config, precision="bf16"))
    dtypes = []
    trainer.model.lm_head.register_forward_hook(lambda module, args, output: dtypes.append(output.dtype))
    metrics = trainer.train_step()
    trainer.evaluate()
    assert set(dtypes) == {torch.bfloat16}
    assert all(parameter.dtype == torch.float32 for parameter in trainer.model.parameters())
    assert metrics.loss == pytest.approx(make_trainer(tiny_run(data.config)).train_step().loss, rel=0.02)


def test_gradients_are_clipped_to_the_norm(data, make_trainer):
    _, clipped = gradients_of_a_step(make_trainer(tiny_run(data.config, gradient_clip=0.01)))
    norm = torch.stack([gradient.norm() for gradient in clipped.values()]).norm().item()
    assert norm == pytest.approx(0.01, rel=1e-3)


def test_a_step_reports_its_schedule_tokens_and_balance(data, make_trainer):
    run = tiny_run(data.config, accumulation_steps=2, schedule={"type": "cosine", "warmup_steps": 4})
    trainer = make_trainer(run)
    metrics = [trainer.train_step() for _ in range(2)]
    assert [found.learning_rate for found in metrics] == pytest.approx([0.00025, 0.0005])
    assert [found.tokens for found in metrics] == [256, 512]
    assert set(metrics[0].max_violation) == {0, 1}
    assert 0 < metrics[0].balance["worst"] <= 1


def router_state(trainer: Trainer) -> dict[str, Tensor]:
    """What moves after the optimiser step."""
    names = ("e_score_correction_bias", "adaptive_coefficients")
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items() if name.endswith(names)}


def test_selection_bias_and_coefficients_follow_the_load_of_the_step(data, make_trainer):
    trainer = make_trainer(tiny_run(data.config, moe=MOVING_BALANCE, accumulation_steps=2))
    contexts = []
    trainer.model.model.add_routing_listener(contexts.append)
    before = router_state(trainer)
    for step in range(3):
        contexts.clear()
        metrics = trainer.train_step()
        after = router_state(trainer)
        rate = 0.02 - 0.01 * (step + 1) / 8
        for layer in (0, 1):
            picks = torch.cat([context.records[layer].index_TK.flatten() for context in contexts])
            load_N = torch.bincount(picks, minlength=4).double()
            update_N = rate * (load_N.mean() - load_N).sign()
            name = f"model.backbone.layers.{layer}.mlp.gate.e_score_correction_bias"
            expected_N = before[name] + update_N - update_N.mean()
            torch.testing.assert_close(after[name], expected_N.float())
            over = (load_N - load_N.mean()).clamp(min=0).sum() / load_N.sum()
            name = f"model.backbone.layers.{layer}.mlp.adaptive_coefficients"
            target = 0.8 * before[name] + 0.2 * min(0.2 * over.item(), 0.01)
            torch.testing.assert_close(after[name], target)
        before = after
        assert metrics.max_violation.keys() == {0, 1}


def test_evaluation_and_recomputation_do_not_move_router_state(data, make_trainer):
    states = []
    for checkpointing in (False, True):
        trainer = make_trainer(tiny_run(data.config, moe=MOVING_BALANCE, gradient_checkpointing=checkpointing))
        for _ in range(2):
            trainer.train_step()
            before = router_state(trainer)
            trainer.evaluate()
            torch.testing.assert_close(router_state(trainer), before, rtol=0, atol=0)
        states.append(router_state(trainer))
    torch.testing.assert_close(*states, rtol=0, atol=0)


def test_coefficients_follow_their_schedule(data, make_trainer):
    balance = [{"type": "load_balancing", "coefficient": {"start": 100.0, "end": 1.0, "shape": "step", "begin": 0.5}}]
    trainer = make_trainer(tiny_run(data.config, moe={"balance": balance}, steps=4, learning_rate=1e-9))
    losses = [trainer.train_step().aux_losses["load_balancing"] for _ in range(4)]
    # A layer's loss is near 1 at random weights, and there are two layers.
    assert [round(loss / 2) for loss in losses[:2]] == [pytest.approx(100, rel=0.2)] * 2
    assert [loss / 2 for loss in losses[2:]] == [pytest.approx(1, rel=0.2)] * 2


def test_a_loss_that_is_not_finite_stops_before_it_does_harm(data, make_trainer):
    trainer = make_trainer(tiny_run(data.config))
    trainer.train_step()
    checkpoint = trainer.save()
    with torch.no_grad():
        trainer.model.lm_head.weight[0, 0] = math.nan
    with pytest.raises(
        TrainingError, match=r"step 2: the cross entropy is nan\. The last good checkpoint is .*00001\."
    ):
        trainer.train_step()
    assert all(tensor.isfinite().all() for tensor in load_model(checkpoint).state_dict().values())


def test_a_gradient_that_is_not_finite_leaves_the_weights(data, make_trainer):
    trainer = make_trainer(tiny_run(data.config))
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.model.lm_head.weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(
        TrainingError, match=r"step 1: the gradient norm is (inf|nan)\. There is no checkpoint yet\. Try"
    ):
        trainer.train_step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.model.state_dict().items())


@pytest.mark.slow
def test_a_compiled_model_trains_as_an_eager_one(data, make_trainer):
    eager = make_trainer(tiny_run(data.config)).train_step()
    compiled = make_trainer(tiny_run(data.config, compile=True)).train_step()
    assert compiled.loss == pytest.approx(eager.loss, rel=1e-4)
    assert compiled.max_violation == eager.max_violation
