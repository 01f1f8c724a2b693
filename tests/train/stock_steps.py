"""Optimiser steps of stock models over a small batch, also in processes of their own."""

from __future__ import annotations

import torch
import torch.distributed as dist
from tests.parity.stock_models import stock_model
from torch import Tensor
from transformers import PreTrainedModel

import moesaic


def ragged_batch() -> dict[str, Tensor]:
    """Four sequences of 12, 9, 7 and 5 tokens, padded on the right; a prompt is not predicted."""
    ids = torch.randint(3, 64, (4, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.zeros_like(ids)
    for row, length in enumerate((12, 9, 7, 5)):
        mask[row, :length] = 1
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, :4] = -100
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}


def gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def step(model: PreTrainedModel, parts: list[slice]) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of an optimiser step over the ragged batch, cut into micro-batches."""
    batch, total = ragged_batch(), 0.0
    model.zero_grad()
    for part in parts:
        micro = {name: tensor[part] for name, tensor in batch.items()}
        loss = model(**micro, num_items_in_batch=int((batch["labels"][:, 1:] != -100).sum())).loss
        loss.backward()
        total += loss.item()
    return total, gradients(model)


def biases_after_a_step(parts: list[slice]) -> dict[str, Tensor]:
    model = stock_model("deepseek_v3").train()
    balancer = moesaic.balance(model, selection_bias_update={"rate": 0.1})
    step(model, parts)
    balancer.step()
    return {name: buffer for name, buffer in model.named_buffers() if name.endswith("correction_bias")}


def biases_on_rank() -> dict[str, Tensor]:
    """On one of two ranks, each with a part of the batch."""
    return biases_after_a_step([slice(0, 1)] if dist.get_rank() == 0 else [slice(1, 2), slice(2, 4)])
