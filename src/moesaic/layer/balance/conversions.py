"""Coefficients of load-balancing losses from other libraries' scales to ours, and back.

Ours: coefficient times the sum over layers of a loss that is 1 for a balanced layer, whatever N and K are. That is also
the scale of DeepSeekMoE (arXiv 2401.06066, eq. 12-14) and, for K = 1, of Switch Transformer (arXiv 2101.03961, eq. 4).
"""

from __future__ import annotations

from typing import Literal

OverLayers = Literal["sum", "mean"]


def from_transformers(coefficient: float, top_k: int, num_layers: int) -> float:
    """Our coefficient for a `router_aux_loss_coef` of transformers.

    There the assignments of all layers are pooled into one mean, and the loss is not divided by K: balanced, it is K.
    With the result both have the same value and gradient whenever all layers have the same load and scores; where
    layers differ, no factor makes them equal, because pooling hides what differs.

    Args:
        coefficient: the other library's.
        top_k: K.
        num_layers: MoE layers, L.
    """
    return coefficient * top_k / num_layers


def to_transformers(coefficient: float, top_k: int, num_layers: int) -> float:
    """The inverse of `from_transformers`."""
    return coefficient * num_layers / top_k


def from_megatron(coefficient: float, num_layers: int, over_layers: OverLayers = "sum") -> float:
    """Our coefficient for one of Megatron's scale: a loss for each layer, divided by K, so that balanced it is 1.

    Args:
        coefficient: the other library's.
        num_layers: MoE layers, L.
        over_layers: how layers come together: "sum" in Megatron-Core (`moe_aux_loss_coeff`), whose logs show the mean;
            "mean" in MegaBlocks (`moe_loss_weight`), and so in OLMoE's training.
    """
    return coefficient if over_layers == "sum" else coefficient / num_layers


def to_megatron(coefficient: float, num_layers: int, over_layers: OverLayers = "sum") -> float:
    """The inverse of `from_megatron`."""
    return coefficient if over_layers == "sum" else coefficient * num_layers


def from_undivided(coefficient: float, top_k: int) -> float:
    """Our coefficient for a loss that is summed over layers and not divided by K, as AdaMoE's (arXiv 2406.13233, eq. 6)."""
    return coefficient * top_k


def to_undivided(coefficient: float, top_k: int) -> float:
    """The inverse of `from_undivided`."""
    return coefficient / top_k
