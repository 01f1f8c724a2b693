"""What tells routers apart: information in the routing, balance of a gate.

Pure functions; information and entropy are in nats.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from moesaic.errors import ConfigError


def domain_information(loads: Mapping[str, Tensor]) -> float:
    """I(domain; expert) of a pick, in nats: 0 where all domains use experts alike, at most log of their number.

    Every domain weighs the same, however many picks it has: p(d, i) = f_di / D with f_di the share of expert i among the
    picks of domain d.

    Args:
        loads: picks of each expert by domain, (N,) each, as in `LayerTrace.domain_loads`; domains without picks are left
            out.
    """
    shares = [load_N.double() / load_N.sum() for load_N in loads.values() if load_N.sum() > 0]
    if len(shares) < 2:
        return 0.0
    joint_DN = torch.stack(shares) / len(shares)
    return float(_information(joint_DN))


def cross_layer_information(first_TN: Tensor, second_TN: Tensor, *, bins: int = 100) -> float:
    """Mutual information between the scores of two layers, in nats, mean over tokens.

    For each token the N scores of either layer fall into bins between `bins` equally spaced edges on [0, 1]; the
    information between both bin numbers is taken over the N experts (RMoE, arXiv 2408.06793, appendix A.4.2, with
    scikit-learn's `mutual_info_score`). At most log N. It is biased upwards for few experts and compares expert i of one
    layer with expert i of the other, so it only ranks routers of the same N.

    Args:
        first_TN: scores in [0, 1] of one layer.
        second_TN: scores of the same tokens in the other.
        bins: number of edges.

    Raises:
        ConfigError: if the layers have different numbers of tokens or experts.
    """
    if first_TN.shape != second_TN.shape:
        raise ConfigError(
            "second_TN", tuple(second_TN.shape), f"is not the shape of first_TN {tuple(first_TN.shape)}", "match them"
        )
    edges = torch.linspace(0.0, 1.0, bins, dtype=torch.float64, device=first_TN.device)
    same_first_TNN, same_second_TNN = (_same_bin(scores_TN, edges) for scores_TN in (first_TN, second_TN))
    # Of each expert: how many share its bin in one layer, in the other, and in both.
    first_TN, second_TN, both_TN = (
        same.sum(-1).double() for same in (same_first_TNN, same_second_TNN, same_first_TNN & same_second_TNN)
    )
    return float((both_TN * first_TN.shape[-1] / (first_TN * second_TN)).log().mean())


def inner_balance(scores_TN: Tensor) -> float:
    """Median over tokens of the best score over the second best (IB of RMoE, arXiv 2408.06793, table 8); from 1."""
    best_T2 = scores_TN.topk(2, dim=-1).values.double()
    return float((best_T2[:, 0] / best_T2[:, 1].clamp(min=torch.finfo(torch.float64).tiny)).median())


def outer_balance(scores_TN: Tensor, top_k: int) -> float:
    """Median over tokens of the `top_k` best scores' share of all (OB of RMoE, arXiv 2408.06793, table 8); K / N to 1."""
    scores_TN = scores_TN.double()
    return float((scores_TN.topk(top_k, dim=-1).values.sum(-1) / scores_TN.sum(-1)).median())


def gate_entropy(scores_TN: Tensor) -> float:
    """Entropy of a token's normalised scores in nats, mean over tokens: log N where a gate has no preference."""
    scores_TN = scores_TN.double()
    return float(torch.special.entr(scores_TN / scores_TN.sum(-1, keepdim=True)).sum(-1).mean())


def _information(joint_AB: Tensor) -> Tensor:
    """sum p(a, b) log(p(a, b) / (p(a) p(b))) of a joint distribution."""
    independent_AB = joint_AB.sum(1, keepdim=True) * joint_AB.sum(0, keepdim=True)
    return torch.special.xlogy(joint_AB, joint_AB / independent_AB.clamp(min=torch.finfo(joint_AB.dtype).tiny)).sum()


def _same_bin(scores_TN: Tensor, edges: Tensor) -> Tensor:
    """Which pairs of a token's scores fall between the same edges, (T, N, N)."""
    bin_TN = torch.bucketize(scores_TN.double().contiguous(), edges, right=True)
    return bin_TN.unsqueeze(-1) == bin_TN.unsqueeze(-2)
