"""The weak logits are those of one of the model's own earlier layers, by its head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moesaic.hf.early_exit import EarlyExits

Divergence = Literal["jensen_shannon", "official"]


class EarlyExit:
    """`Passes` of which the weak one is the part of the strong one that a layer ends; all rows have one.

    Args:
        model: the model.
        layers: candidates; 0 is the token embedding. Of several, each row takes the one that is farthest from the last
            layer, at every token anew.
        normalise: see `EarlyExits`.
        divergence: see `distance`.

    Raises:
        UnsupportedModel: see `EarlyExits`.
    """

    def __init__(
        self, model: PreTrainedModel, layers: Sequence[int], *, normalise: bool, divergence: Divergence
    ) -> None:
        self._model = model
        self._divergence: Divergence = divergence
        self._exits = EarlyExits(model, layers, normalise=normalise)
        self.weak_WV = torch.empty(0, 0)

    def __call__(self, inputs: dict[str, Any], /) -> Any:
        output = self._model(**{**inputs, "output_hidden_states": True})
        strong_BV = output.logits[:, -1].float()
        exits_LBV = self._exits.logits(output).to(strong_BV)
        if not inputs.get("output_hidden_states"):
            output.hidden_states = None  # those of a long prompt are large
        if len(exits_LBV) == 1:
            self.weak_WV = exits_LBV[0]
        else:
            farthest_B = distance(strong_BV, exits_LBV, self._divergence).argmax(0)
            self.weak_WV = exits_LBV[farthest_B, torch.arange(len(farthest_B), device=farthest_B.device)]
        return output

    def reorder(self, cache: Any, rows_B: Tensor, /) -> Any:
        cache.reorder_cache(rows_B)
        return cache


def distance(strong_BV: Tensor, exits_LBV: Tensor, divergence: Divergence) -> Tensor:
    """How far the next-token distribution of each exit is from that of the last layer, (L, B), in nats.

    Args:
        strong_BV: logits of the last layer.
        exits_LBV: logits of the exits.
        divergence: "jensen_shannon" is that of DoLa (section 2.2), the mean divergence of both distributions from their mixture.
            "official" is that of the published code and of transformers, whose terms have their arguments the other way
            round: the mean divergence of the mixture from both.
    """
    log_strong_BV, log_exits_LBV = strong_BV.log_softmax(-1), exits_LBV.log_softmax(-1)
    mixture_LBV = (log_strong_BV.exp() + log_exits_LBV.exp()) / 2
    log_mixture_LBV = mixture_LBV.log()
    total_LB = torch.zeros(exits_LBV.shape[:2], device=exits_LBV.device)
    for log_own_LBV in (log_strong_BV.expand_as(log_exits_LBV), log_exits_LBV):
        if divergence == "jensen_shannon":
            terms_LBV = log_own_LBV.exp() * (log_own_LBV - log_mixture_LBV)
            terms_LBV = torch.where(log_own_LBV.exp() > 0, terms_LBV, 0)
        else:
            terms_LBV = mixture_LBV * (log_mixture_LBV - log_own_LBV)
            terms_LBV = torch.where(mixture_LBV > 0, terms_LBV, 0)
        total_LB += terms_LBV.sum(-1) / 2
    return total_LB
