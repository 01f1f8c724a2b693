"""What moesaic models return."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers import Cache
from transformers.utils.generic import ModelOutput

from moesaic.layer import RoutingContext


@dataclass
class MoeModelOutput(ModelOutput):
    """Output of `MoesaicModel`.

    Attributes:
        last_hidden_state: (B, S, D).
        past_key_values: the cache, if used.
        hidden_states: (B, S, D) for the embedding and each layer, if asked for.
        attentions: attention weights for each layer, if asked for.
        router_logits: (B*S, N) for each MoE layer, in layer order, if asked for.
        routing: the routing of all MoE layers, if asked for.
    """

    last_hidden_state: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    router_logits: tuple[Tensor, ...] | None = None
    routing: RoutingContext | None = None


@dataclass
class MoeCausalLMOutput(ModelOutput):
    """Output of `MoesaicForCausalLM`.

    Attributes:
        loss: with labels: the cross entropy, in training mode plus all of `aux_losses`.
        logits: (B, S, V).
        aux_losses: balance losses by name, coefficient included, summed over MoE layers; with labels or when router
            logits are asked for.
        past_key_values: the cache, if used.
        hidden_states: (B, S, D) for the embedding and each layer, if asked for.
        attentions: attention weights for each layer, if asked for.
        router_logits: (B*S, N) for each MoE layer, in layer order, if asked for.
        routing: the routing of all MoE layers, if asked for.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    aux_losses: dict[str, Tensor] | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    router_logits: tuple[Tensor, ...] | None = None
    routing: RoutingContext | None = None
