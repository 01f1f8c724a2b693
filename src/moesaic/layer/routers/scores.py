"""Score functions, group limits and top-k with a tie rule: the pure functions that token-choice routers share."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

ScoreFunction = Literal["softmax", "sigmoid", "sqrt_softplus"]
GroupScore = Literal["max", "top2_sum"]


def score(logits_TN: Tensor, function: ScoreFunction) -> Tensor:
    """Scores of all experts; softmax rows sum to 1, the others are independent for each expert."""
    match function:
        case "softmax":
            return logits_TN.softmax(-1)
        case "sigmoid":
            return logits_TN.sigmoid()
        case "sqrt_softplus":
            # The root of 0, which the softplus of about -100 is, has no derivative.
            return F.softplus(logits_TN).clamp(min=torch.finfo(logits_TN.dtype).tiny).sqrt()


def limit_to_groups(
    scores_TN: Tensor, num_groups: int, top_k_groups: int, group_score: GroupScore, mask_value: float
) -> Tensor:
    """Mask all experts outside each token's best groups.

    Experts are grouped in index order. A group's score is its best expert ("max", DeepSeek-V2 report section 2.2.2) or
    the sum of its two best ("top2_sum", DeepSeek-V3 report section 2.1.2). Ties go to the lower group.

    Args:
        scores_TN: scores that the selection will compare.
        mask_value: what masked experts get. Only `-inf` keeps them out when allowed scores can be negative.
    """
    groups_TGE = scores_TN.unflatten(-1, (num_groups, -1))
    best = 1 if group_score == "max" else 2
    group_scores_TG = groups_TGE.topk(best, dim=-1).values.sum(-1)
    keep_TG = torch.zeros_like(group_scores_TG, dtype=torch.bool)
    keep_TG = keep_TG.scatter(-1, top_k(group_scores_TG, top_k_groups, stable=True), True)
    return groups_TGE.masked_fill(~keep_TG.unsqueeze(-1), mask_value).flatten(-2)


def top_k(scores_TN: Tensor, k: int, *, stable: bool) -> Tensor:
    """Indices of the k largest scores of each row, best first.

    Args:
        stable: ties go to the lower index on every device. Otherwise torch.topk decides, which is faster for large N.
    """
    if stable:
        return scores_TN.sort(dim=-1, descending=True, stable=True).indices[..., :k].contiguous()
    return scores_TN.topk(k, dim=-1).indices


def normalize(weight_TK: Tensor, *, order: float = 1.0, floor: float = 0.0, epsilon: float = 0.0) -> Tensor:
    """Divide each token's K weights, none of them negative, by their L_p norm.

    Args:
        weight_TK: weights of the picks.
        order: p; 1 is the sum.
        floor: the least value of the norm.
        epsilon: added to it after that.
    """
    if order == 1:
        total_T1 = weight_TK.sum(-1, keepdim=True)
    else:
        total_T1 = torch.linalg.vector_norm(weight_TK, ord=order, dim=-1, keepdim=True)
    if floor:
        total_T1 = total_T1.clamp(min=floor)
    return weight_TK / (total_T1 + epsilon)


def at(values_TN: Tensor, index_TK: Tensor, kept_TK: Tensor | None = None) -> Tensor:
    """Values at picks, 0 for those that are not kept."""
    value_TK = values_TN.gather(-1, index_TK)
    return value_TK if kept_TK is None else value_TK.masked_fill(~kept_TK, 0.0)


def softmax_over(logits_TK: Tensor, kept_TK: Tensor | None = None) -> Tensor:
    """Softmax over the kept columns of each row: their scores over their sum. 0 elsewhere, and in rows without any.

    From logits rather than scores, so that experts whose scores underflow beside others' still share their weight.
    """
    if kept_TK is None:
        return logits_TK.softmax(-1)
    # A row of -inf only would be NaN, and so would its gradient.
    masked_TK = logits_TK.masked_fill(~kept_TK & kept_TK.any(-1, keepdim=True), float("-inf"))
    return masked_TK.softmax(-1) * kept_TK


def keep_best(scores_TN: Tensor, k: int | Tensor, *, width: int) -> tuple[Tensor, Tensor]:
    """The k best experts of each token in a record of a given width: index and score, N and 0 beyond k.

    Args:
        scores_TN: scores of all experts.
        k: how many, at most `width`; a tensor for a number that changes in training.
        width: picks in the record.
    """
    index_TK = top_k(scores_TN.detach(), width, stable=True)
    kept_K = torch.arange(width, device=scores_TN.device) < k
    return index_TK.masked_fill(~kept_K, scores_TN.shape[-1]), scores_TN.gather(-1, index_TK) * kept_K
