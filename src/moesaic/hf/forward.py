"""From the arguments of a model's forward to the routing context, and to the weights of its sequences in the loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moesaic.layer import RoutingContext


def forward_context(
    input_ids: Tensor | None, inputs_embeds: Tensor | None, position_ids: Tensor | None, attention_mask: Any
) -> RoutingContext:
    """The context of a forward pass over (B, S) tokens."""
    given = input_ids if input_ids is not None else inputs_embeds
    if given is None:
        raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
    batch, length = given.shape[:2]
    mask_T = None
    if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
        # With a cache the mask also covers past tokens, which are not routed again.
        mask_T = attention_mask[:, -length:].reshape(-1).bool()
    return RoutingContext(
        batch_size=batch,
        token_ids_T=None if input_ids is None else input_ids.reshape(-1),
        position_T=None if position_ids is None else position_ids.expand(batch, -1).reshape(-1),
        mask_T=mask_T,
    )


def num_tokens(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> int:
    """T, the tokens of a forward pass."""
    given = input_ids if input_ids is not None else inputs_embeds
    return 0 if given is None else given.shape[0] * given.shape[1]


def positions_after(context: RoutingContext, length: int, attention_mask: Any, past_key_values: Any) -> Tensor | None:
    """Positions of a forward pass: those that were given, or where a cache of earlier tokens ends; None without either.

    Args:
        context: of the forward pass.
        length: tokens of each sequence in it.
        attention_mask: as the model was given it; of two dimensions it tells padding, which has no position.
        past_key_values: the cache before the forward pass.
    """
    past = 0 if past_key_values is None else int(past_key_values.get_seq_length())
    if context.position_T is not None or not past:
        return context.position_T
    if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2 and attention_mask.shape[1] == past + length:
        return (attention_mask.long().cumsum(-1) - 1)[:, -length:].clamp(min=0).reshape(-1)
    return torch.arange(past, past + length).repeat(context.batch_size)


def sequence_weights(
    labels: Tensor | None,
    context: RoutingContext,
    device: torch.device,
    num_items_in_batch: Tensor | int | None = None,
    shift_labels: Tensor | None = None,
) -> Tensor:
    """Share of each sequence in the mean: its predicted tokens over those of the step, as in the cross entropy.

    Args:
        labels: (B, S) ids to predict, not shifted; without any labels a sequence counts as its real tokens do.
        context: of the forward pass.
        device: of the result, float32 (B,).
        num_items_in_batch: predicted tokens of the whole step; None for those given here.
        shift_labels: (B, S) ids to predict, shifted already.
    """
    targets = shift_labels if shift_labels is not None else labels[:, 1:] if labels is not None else None
    if targets is not None:
        tokens_B = (targets != -100).sum(-1).to(device=device, dtype=torch.float32)
    else:
        num_tokens = next(iter(context.records.values())).index_TK.shape[0] if context.records else context.batch_size
        tokens_B = context.tokens_per_sequence(num_tokens, dtype=torch.float32, device=device)
    total = tokens_B.sum() if num_items_in_batch is None or targets is None else num_items_in_batch
    return tokens_B / torch.as_tensor(total, device=device, dtype=torch.float32).clamp(min=1)
