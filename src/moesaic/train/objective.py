"""The training loss of one micro-batch, for MoE and dense models alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moesaic.hf import MoesaicForCausalLM
from moesaic.layer import RoutingContext

_IGNORED_LABEL = -100
_MODEL_INPUTS = ("input_ids", "labels", "position_ids", "attention_mask")
_MOESAIC_INPUTS = ("modality_ids", "task_ids")


@dataclass(frozen=True)
class Objective:
    """What a micro-batch adds to the loss of its optimiser step.

    Attributes:
        loss: to differentiate: cross entropy plus balance losses, scalar.
        cross_entropy: the language-model part, detached.
        aux_losses: balance losses by name, coefficient included, detached, and "output_z_loss" where there is one.
        routing: what the routers did; None for dense models.
    """

    loss: Tensor
    cross_entropy: Tensor
    aux_losses: dict[str, Tensor]
    routing: RoutingContext | None


def model_inputs(batch: Mapping[str, Any], device: torch.device) -> dict[str, Tensor]:
    """The entries of a batch that our models take, on `device`."""
    names = (*_MODEL_INPUTS, *_MOESAIC_INPUTS)
    return {name: batch[name].to(device, non_blocking=True) for name in names if name in batch}


def inputs_known_to(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`inputs` without those that only our models have a place for, if `model` is not one."""
    ours = isinstance(model, MoesaicForCausalLM)
    return {name: tensor for name, tensor in inputs.items() if ours or name not in _MOESAIC_INPUTS}


def predicted_tokens(batches: Sequence[Mapping[str, Any]]) -> int:
    """Number of labels that are predicted: models shift labels, so the first of a sequence never is."""
    return sum(int((batch["labels"][:, 1:] != _IGNORED_LABEL).sum()) for batch in batches)


def language_model_objective(
    model: PreTrainedModel, inputs: Mapping[str, Tensor], num_items_in_batch: int, output_z_loss: float = 0.0
) -> Objective:
    """Run the model, in training mode, on one micro-batch.

    Args:
        model: an HF causal language model whose forward takes `num_items_in_batch`.
        inputs: as `model_inputs` gives them, (B, S) each; a dense model is not told modalities or tasks.
        num_items_in_batch: predicted tokens of all micro-batches of the optimiser step. All losses are shares of the
            mean over them, so that their sums over micro-batches are those of one large batch.
        output_z_loss: coefficient of the mean square of log sum exp of the output logits; 0 for none.
    """
    extra = {"output_routing": True} if isinstance(model, MoesaicForCausalLM) else {}
    output = model(**inputs_known_to(model, inputs), num_items_in_batch=num_items_in_batch, use_cache=False, **extra)
    aux_losses = {name: loss.detach() for name, loss in (getattr(output, "aux_losses", None) or {}).items()}
    cross_entropy = output.loss.detach() - sum(aux_losses.values(), start=torch.zeros((), device=output.loss.device))
    loss = output.loss
    if output_z_loss:
        z_loss = output_z_loss * _squared_log_sums(output.logits, inputs["labels"]) / num_items_in_batch
        aux_losses["output_z_loss"], loss = z_loss.detach(), loss + z_loss
    return Objective(loss, cross_entropy, aux_losses, getattr(output, "routing", None))


def _squared_log_sums(logits_BSV: Tensor, labels_BS: Tensor) -> Tensor:
    """Sum of (log sum exp logits)^2 over the positions that predict something, in at least float32."""
    predicts_BS = labels_BS[:, 1:] != _IGNORED_LABEL
    logits_BSV = logits_BSV[:, :-1]
    z_BS = logits_BSV.to(torch.promote_types(logits_BSV.dtype, torch.float32)).logsumexp(-1).square()
    return z_BS.masked_fill(~predicts_BS, 0.0).sum()
