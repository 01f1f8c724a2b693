"""`balance` under TRL's `SFTTrainer`, which makes its loss past the model's own; needs the package trl."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from tests.parity.stock_models import stock_model
from tests.train.test_stock_balance import LOSSES, Trainer, assert_same, make_trainer, sequences
from torch import Tensor
from transformers import PreTrainedModel

import moesaic
from moesaic.errors import TrainingError
from moesaic.train import Balancer

trl = pytest.importorskip("trl")


def sft_trainer(model: PreTrainedModel, tokenizer: Any, folder: Path, batch_size: int, **settings: Any) -> Any:
    """On the sequences of the ragged batch, without their padding."""
    arguments = trl.SFTConfig(
        output_dir=str(folder),
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=4 // batch_size,
        gradient_checkpointing=False,
        max_steps=2,
        max_grad_norm=0,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        optim="sgd",
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=1,
        **settings,
    )
    rows = []
    for row in sequences():
        real = row["attention_mask"].bool()
        rows.append({"input_ids": row["input_ids"][real].tolist(), "labels": row["labels"][real].tolist()})
    return trl.SFTTrainer(
        model=model, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )


@pytest.fixture(scope="module")
def tokenizer(data: Any) -> Any:
    tokenizer = data.tokenizer
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def weights(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("batch_size", [4, 1])
@pytest.mark.parametrize("first", ["balance", "trainer"])
@pytest.mark.parametrize("model_type", ["qwen3_moe", "deepseek_v3"])
def test_sft_trains_as_hf_trainer_does(
    tmp_path: Path, tokenizer: Any, model_type: str, first: str, batch_size: int
) -> None:
    reference = stock_model(model_type)
    trainer = make_trainer(Trainer, reference, tmp_path, 4)
    moesaic.balance(reference, LOSSES).attach(trainer)
    trainer.train()

    own: dict[str, Any] = {}
    if model_type == "qwen3_moe":
        own = {"output_router_logits": True, "router_aux_loss_coef": 10.0}  # would be seen if it were added
    model = stock_model(model_type, **own)
    balancer: Balancer | None = moesaic.balance(model, LOSSES) if first == "balance" else None
    sft = sft_trainer(model, tokenizer, tmp_path, batch_size)
    if balancer is None:
        balancer = moesaic.balance(model, LOSSES)
    balancer.attach(sft)
    sft.train()
    assert_same(weights(model), weights(reference))
    assert any("max_violation/layer_1" in entry for entry in sft.state.log_history)


@pytest.mark.parametrize("first", ["balance", "trainer"])
def test_sft_without_attach_is_an_error(tmp_path: Path, tokenizer: Any, first: str) -> None:
    model = stock_model("deepseek_v3")
    balancer = moesaic.balance(model, LOSSES) if first == "balance" else None
    sft = sft_trainer(model, tokenizer, tmp_path, 4)
    balancer = balancer or moesaic.balance(model, LOSSES)
    sft.add_callback(balancer.callback)
    with pytest.raises(TrainingError, match=r"call balancer\.attach\(trainer\)"):
        sft.train()
