"""`balance` on stock models: the numbers of our own converted models, whatever trains them, and nothing left behind."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.distributed.spawn import run_ranks
from tests.parity.stock_models import stock_config, stock_model
from tests.parity.test_convert import gradients_under_stock_names
from tests.train.stock_steps import biases_after_a_step, biases_on_rank, gradients, ragged_batch, step
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainingArguments

import moesaic
from moesaic.errors import ConfigError, TrainingError, UnsupportedModel
from moesaic.layer import BalanceLoss, LoadBalancing, ZLoss, loads_of, max_violation
from moesaic.layer.balance import Coefficients

LOSSES: list[BalanceLoss] = [LoadBalancing(coefficient=0.3), ZLoss(coefficient=0.1)]
MODELS = ["mixtral", "qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss"]


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(
            actual[name], gradient, rtol=1e-4, atol=1e-5, msg=lambda text, at=name: f"{at}: {text}"
        )


# --- The numbers of our own models --------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", MODELS)
def test_loss_and_gradients_are_those_of_the_converted_model(model_type: str) -> None:
    stock = stock_model(model_type).train()
    ours = moesaic.convert(stock).train()
    ours.balance = tuple(LOSSES)
    ours.coefficients = Coefficients(LOSSES, ours._coefficients_of_layer)
    batch = ragged_batch()
    expected = ours(**batch)
    expected.loss.backward()
    plain = stock(**batch).loss

    balancer = moesaic.balance(stock, LOSSES)
    output = stock(**batch)
    output.loss.backward()
    torch.testing.assert_close(output.loss, expected.loss, rtol=1e-5, atol=1e-5)
    assert output.loss > plain + 0.1
    torch.testing.assert_close(balancer.aux_losses, {k: v.detach() for k, v in expected.aux_losses.items()})
    theirs = gradients_under_stock_names(ours)
    assert_same(gradients(stock), {name: gradient for name, gradient in theirs.items() if gradient is not None})


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("model_type", MODELS)
def test_checkpointing_changes_nothing(model_type: str, reentrant: bool) -> None:
    model = stock_model(model_type).train()
    moesaic.balance(model, LOSSES)
    expected_loss, expected = step(model, [slice(0, 2), slice(2, 4)])
    expected = {name: gradient.clone() for name, gradient in expected.items()}
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    loss, actual = step(model, [slice(0, 2), slice(2, 4)])
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert_same(actual, expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_two_forwards_may_be_open_before_their_backwards(reentrant: bool) -> None:
    model = stock_model("mixtral").train()
    moesaic.balance(model, LOSSES)
    batch, items = ragged_batch(), 38
    results = []
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    for order in ((0, 1), (1, 0)):
        model.zero_grad()
        micro = [{name: tensor[row : row + 1] for name, tensor in batch.items()} for row in range(2)]
        losses = [model(**part, num_items_in_batch=items).loss for part in micro]
        for index in order:
            losses[index].backward()
        results.append({name: gradient.clone() for name, gradient in gradients(model).items()})
    assert_same(results[0], results[1])
    model.gradient_checkpointing_disable()
    model.zero_grad()
    for part in micro:
        model(**part, num_items_in_batch=items).loss.backward()
    assert_same(results[0], gradients(model))


def test_accumulation_changes_nothing() -> None:
    model = stock_model("qwen3_moe").train()
    moesaic.balance(model, LOSSES)
    loss, expected = step(model, [slice(0, 4)])
    expected = {name: gradient.clone() for name, gradient in expected.items()}
    accumulated, actual = step(model, [slice(0, 1), slice(1, 4)])
    assert accumulated == pytest.approx(loss, rel=1e-5)
    assert_same(actual, expected)


def test_evaluation_and_calls_without_labels_are_left_alone() -> None:
    model = stock_model("mixtral")
    batch = ragged_batch()
    expected = model(**batch)
    balancer = moesaic.balance(model, LOSSES)
    assert torch.equal(model(**batch).loss, expected.loss)
    assert model.train()(batch["input_ids"]).loss is None
    loss, logits = model(**batch, return_dict=False)[:2]
    torch.testing.assert_close(logits, expected.logits)
    torch.testing.assert_close(loss, expected.loss + sum(balancer.aux_losses.values()))


# --- Steps ----------------------------------------------------------------------------------------------------------


def test_bias_follows_the_load_of_the_step_and_statistics_report_it() -> None:
    model = stock_model("deepseek_v3").train()
    balancer = moesaic.balance(model, LOSSES, selection_bias_update={"rate": 0.1, "center": False})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    balancer.attach(optimizer)
    ours = moesaic.convert(model)
    before = {name: buffer.clone() for name, buffer in model.named_buffers() if name.endswith("correction_bias")}
    assert len(before) == 2
    total, _ = step(model, [slice(0, 1), slice(1, 4)])
    optimizer.step()
    context = ours(**ragged_batch(), output_routing=True).routing
    statistics = balancer.statistics()
    for layer, load in loads_of(context).items():
        name = f"model.layers.{layer}.mlp.gate.e_score_correction_bias"
        load_N = load.chosen_M.double()
        expected_N = before[name] + (0.1 * (load_N.mean() - load_N).sign()).float()
        torch.testing.assert_close(dict(model.named_buffers())[name], expected_N)
        assert statistics[f"max_violation/layer_{layer}"] == pytest.approx(max_violation(load.load_N).item())
    assert set(statistics) == {
        *(f"max_violation/layer_{layer}" for layer in (1, 2)),
        "aux_loss/load_balancing",
        "aux_loss/z_loss",
    }
    cross_entropy = ours(**ragged_batch()).loss.item()
    added = statistics["aux_loss/load_balancing"] + statistics["aux_loss/z_loss"]
    assert total == pytest.approx(cross_entropy + added, rel=1e-4)
    # Nothing happened since: nothing moves.
    after = {name: buffer.clone() for name, buffer in model.named_buffers() if name in before}
    optimizer.step()
    assert all(torch.equal(buffer, after[name]) for name, buffer in model.named_buffers() if name in after)


def test_a_bias_in_low_precision_adds_up_small_steps() -> None:
    model = stock_model("deepseek_v3").train()
    for module in model.modules():
        if hasattr(module, "e_score_correction_bias"):
            module.e_score_correction_bias = module.e_score_correction_bias.fill_(1.0).bfloat16()
    balancer = moesaic.balance(model, selection_bias_update={"rate": 1e-3, "center": False})
    batch = ragged_batch()
    for _ in range(16):
        model(**batch)
        balancer.step()
    (bias_N, *_) = (buffer for name, buffer in model.named_buffers() if name.endswith("correction_bias"))
    assert bias_N.dtype == torch.bfloat16
    # A single step of 0.001 from 1.0 is below the resolution of bfloat16.
    assert (bias_N.float() - 1).abs().max() > 0.01


def test_schedules_and_adaptive_coefficients_move() -> None:
    losses = [
        {"type": "load_balancing", "coefficient": {"start": 0.4, "end": 0.0}},
        {"type": "z_loss", "coefficient": 0.1, "adaptive": {"capacity_factor": 1.0, "decay": 0.5}},
    ]
    model = stock_model("mixtral").train()
    balancer = moesaic.balance(model, losses)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with pytest.raises(ConfigError, match="steps = None is needed by schedules"):
        balancer.attach(optimizer)
    balancer.attach(optimizer, steps=4)
    found = []
    for _ in range(3):
        model(**ragged_batch())
        found.append({name: value.item() for name, value in balancer.aux_losses.items()})
        optimizer.step()
    assert [one["load_balancing"] / found[0]["load_balancing"] for one in found] == pytest.approx([1, 0.75, 0.5])
    assert found[2]["z_loss"] < found[1]["z_loss"] < found[0]["z_loss"]
    state = copy.deepcopy(balancer.state_dict())
    balancer.remove()
    again = moesaic.balance(model, losses)
    again.load_state_dict(state)
    again.set_training_progress(0.75)
    model(**ragged_batch())
    assert again.aux_losses["z_loss"] < found[2]["z_loss"]
    assert again.aux_losses["load_balancing"].item() == pytest.approx(found[0]["load_balancing"] / 4)


# --- HF Trainer and others --------------------------------------------------------------------------------------------


class OwnLossTrainer(Trainer):
    """As TRL's trainers: the loss is made from the outputs, past the loss of the model."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs["labels"]
        output = model(**{name: value for name, value in inputs.items() if name != "labels"})
        loss = torch.nn.functional.cross_entropy(
            output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
        )
        loss = loss / num_items_in_batch
        return (loss, output) if return_outputs else loss


def sequences() -> list[dict[str, Tensor]]:
    """Of the ragged batch; all of one length."""
    batch = ragged_batch()
    return [{name: tensor[row] for name, tensor in batch.items()} for row in range(4)]


def make_trainer(
    kind: type[Trainer], model: PreTrainedModel, folder: Path, batch_size: int, **settings: Any
) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=4 // batch_size,
        max_steps=2,
        max_grad_norm=0,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        optim="sgd",
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=1,
        **settings,
    )
    return kind(model=model, args=arguments, train_dataset=sequences(), eval_dataset=sequences())


def trained(
    kind: type[Trainer], folder: Path, batch_size: int, *, attach: bool, balanced: bool = True, **settings: Any
) -> tuple[dict[str, Tensor], list[dict]]:
    """Weights after two steps, and the logs."""
    model = stock_model("deepseek_v3")
    trainer = make_trainer(kind, model, folder, batch_size, **settings)
    if balanced:
        balancer = moesaic.balance(model, LOSSES, selection_bias_update={"rate": 0.05})
        if attach:
            balancer.attach(trainer)
        else:
            trainer.add_callback(balancer.callback)
    trainer.train()
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}, trainer.state.log_history


@pytest.mark.parametrize("attach", [False, True], ids=["callback", "attach"])
def test_hf_trainer_whatever_the_accumulation(tmp_path: Path, attach: bool) -> None:
    whole, logs = trained(Trainer, tmp_path, 4, attach=attach, eval_strategy="steps", eval_steps=1)
    split, _ = trained(Trainer, tmp_path, 1, attach=attach)
    plain, _ = trained(Trainer, tmp_path, 4, attach=attach, balanced=False)
    assert_same(split, whole)
    gates = [name for name in whole if name.endswith(("gate.weight", "correction_bias"))]
    assert all((whole[name] - plain[name]).abs().max() > 1e-4 for name in gates)
    steps = [entry for entry in logs if "loss" in entry]
    assert len(steps) == 2
    assert {"max_violation/layer_1", "max_violation/layer_2", "aux_loss/load_balancing", "aux_loss/z_loss"} <= set(
        steps[0]
    )


def test_trainers_with_a_loss_of_their_own(tmp_path: Path) -> None:
    expected, _ = trained(Trainer, tmp_path, 4, attach=True)
    for batch_size in (4, 1):
        found, _ = trained(OwnLossTrainer, tmp_path, batch_size, attach=True)
        assert_same(found, expected)


def test_losses_that_reach_nothing_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"balance has not seen this step: .*call balancer\.attach\(trainer\)"):
        trained(OwnLossTrainer, tmp_path, 4, attach=False)


def test_models_under_peft_are_balanced_before_or_after_wrapping() -> None:
    batch, results = ragged_batch(), []
    for first in (True, False):
        model = stock_model("mixtral")
        if first:
            moesaic.balance(model, LOSSES)
        torch.manual_seed(0)
        wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj"], r=2)).train()
        if not first:
            moesaic.balance(wrapped, LOSSES)
        results.append(wrapped(**batch).loss)
    plain = stock_model("mixtral").train()(**batch).loss
    torch.testing.assert_close(results[0], results[1])
    assert results[0] > plain + 0.1


# --- The model's own loss, and the way back --------------------------------------------------------------------------


def test_the_models_own_loss_is_switched_off_with_a_warning_and_restored(caplog: pytest.LogCaptureFixture) -> None:
    model = stock_model("mixtral", output_router_logits=True, router_aux_loss_coef=0.5).train()
    batch = ragged_batch()
    with_own = model(**batch).loss
    with caplog.at_level(logging.WARNING):
        balancer = moesaic.balance(model, LOSSES)
    assert "MixtralForCausalLM itself (router_aux_loss_coef = 0.5) is switched off" in caplog.text
    output = model(**batch, output_router_logits=True)
    cross_entropy = torch.nn.functional.cross_entropy(
        output.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
    )
    torch.testing.assert_close(output.loss, cross_entropy + sum(balancer.aux_losses.values()))
    balancer.remove()
    assert model.config.output_router_logits is True
    assert (model.config.router_aux_loss_coef, model.router_aux_loss_coef) == (0.5, 0.5)
    assert torch.equal(model(**batch).loss, with_own)


def test_an_own_loss_that_comes_back_is_an_error() -> None:
    model = stock_model("mixtral").train()
    moesaic.balance(model, LOSSES)
    model.config.output_router_logits, model.config.router_aux_loss_coef = True, 0.1
    with pytest.raises(TrainingError, match="the model's own balance loss has been switched on again"):
        model(**ragged_batch())


@pytest.mark.parametrize("model_type", MODELS)
def test_remove_leaves_nothing_behind(model_type: str, tmp_path: Path) -> None:
    model = stock_model(model_type).train()
    expected, names = model(**ragged_batch()).loss, set(vars(model))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    trainer = make_trainer(Trainer, model, tmp_path, 4)
    callbacks = list(trainer.callback_handler.callbacks)
    balancer = moesaic.balance(model, LOSSES)
    balancer.attach(optimizer)
    balancer.attach(trainer)
    model(**ragged_batch())
    balancer.remove()
    assert set(vars(model)) == names
    assert not any(module._forward_hooks for module in model.modules())
    assert not optimizer._optimizer_step_post_hooks
    assert trainer.callback_handler.callbacks == callbacks
    assert "compute_loss" not in vars(trainer)
    assert torch.equal(model(**ragged_batch()).loss, expected)


def test_what_cannot_be_balanced_is_refused_with_the_reason() -> None:
    model = stock_model("mixtral")
    with pytest.raises(ConfigError, match=r"losses = .* leaves nothing to do"):
        moesaic.balance(model)
    with pytest.raises(ConfigError, match=r"selection_bias_update = .* finds no bias in router top_k"):
        moesaic.balance(model, selection_bias_update={})
    with pytest.raises(ConfigError, match=r"balance\.0\.type = 'load' needs a router that knows"):
        moesaic.balance(model, [{"type": "load", "coefficient": 1.0}])
    with pytest.raises(ConfigError, match=r"balance\.0\.num_devices = 3 does not divide num_experts \(8\)"):
        moesaic.balance(model, [{"type": "device_balance", "num_devices": 3, "coefficient": 1.0}])
    with pytest.raises(ConfigError, match=r"balance\.1\.type = 'local_entropy' looks at the modality of tokens, which"):
        moesaic.balance(model, [*LOSSES, {"type": "local_entropy", "modality": 1, "coefficient": 1.0}][-2:])
    with pytest.raises(ConfigError, match=r"losses = .* is one loss, not a list of them; put it in a list"):
        moesaic.balance(model, {"type": "z_loss", "coefficient": 1.0})  # pyright: ignore[reportArgumentType]
    with pytest.raises(UnsupportedModel, match="MoesaicForCausalLM is a moesaic model"):
        moesaic.balance(moesaic.convert(model), LOSSES)
    with pytest.raises(UnsupportedModel, match="'llama' is not a known MoE family"):
        moesaic.balance(AutoModelForCausalLM.from_config(stock_config("llama", intermediate_size=16)), LOSSES)
    moesaic.balance(model, LOSSES)
    with pytest.raises(TrainingError, match="MixtralForCausalLM has a balancer already"):
        moesaic.balance(model, LOSSES)


@pytest.mark.parametrize("model_type", MODELS)
def test_in_bfloat16_the_picks_that_were_made_are_counted(model_type: str) -> None:
    model = stock_model(model_type).train().bfloat16()
    picked: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if name.endswith(("mlp.gate", "mlp.router")) and type(module).__name__.lower().endswith("topkrouter"):
            module.register_forward_hook(lambda module, args, output, at=name: picked.update({at: output[2]}))
    balancer = moesaic.balance(model, LOSSES)
    batch = ragged_batch()
    model(**batch).loss.backward()
    balancer.step()
    statistics, real = balancer.statistics(), batch["attention_mask"].flatten().bool()
    assert picked
    for name, index_TK in picked.items():
        load_N = torch.bincount(index_TK[real].flatten(), minlength=8)
        layer = name.split(".")[2]
        assert statistics[f"max_violation/layer_{layer}"] == pytest.approx(max_violation(load_N).item())
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())


def test_two_processes_move_the_bias_as_one_does() -> None:
    whole = biases_after_a_step([slice(0, 4)])
    for found in run_ranks(2, biases_on_rank):
        assert found.keys() == whole.keys()
        assert all(torch.equal(found[name], whole[name]) for name in whole)
