"""Two next-token distributions, a strong and a weak one, set against each other: equations 5 and 6 of SCMoE
(arXiv 2405.14507), which are those of contrastive decoding (arXiv 2210.15097, 2309.09117)."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def plausible(strong_BV: Tensor, alpha: float) -> Tensor:
    """The tokens whose probability is at least `alpha` times that of the likeliest (equation 6).

    Args:
        strong_BV: logits of the strong distribution.
        alpha: in (0, 1]; 1 leaves the likeliest tokens alone.

    Returns:
        (B, V), bool.
    """
    # Of a row without any token nothing is plausible, although its -inf are all equal.
    return (strong_BV >= strong_BV.amax(-1, keepdim=True) + math.log(alpha)) & (strong_BV > -torch.inf)


def contrast(strong_BV: Tensor, weak_BV: Tensor, *, alpha: float, beta: float) -> Tensor:
    """(1 + beta) strong - beta weak for plausible tokens, -inf for others (equation 5), in float32.

    Both may be shifted by a constant for each row, as log-probabilities are, which changes nothing but a constant.

    Args:
        strong_BV: logits of the strong distribution; -inf for tokens that are ruled out.
        weak_BV: logits of the weak one.
        alpha: see `plausible`; 0 finds every token plausible that is not ruled out.
        beta: strength, 0 or more.
    """
    strong_BV, weak_BV = strong_BV.float(), weak_BV.float()
    kept_BV = strong_BV > -torch.inf if alpha == 0 else plausible(strong_BV, alpha)
    # With the mask last, infinities are never subtracted from each other.
    return torch.where(kept_BV, strong_BV + beta * (strong_BV - weak_BV), -torch.inf)


def difference(strong_BV: Tensor, weak_BV: Tensor, *, alpha: float) -> Tensor:
    """log p_strong - log p_weak for plausible tokens, -inf for others, in float32: the contrast of 2210.15097 (section 3)
    and of DoLa (arXiv 2309.03883, section 2.3), towards which that of `contrast` goes as beta grows.

    Args:
        strong_BV, weak_BV, alpha: see `contrast`.
    """
    strong_BV, weak_BV = strong_BV.float(), weak_BV.float()
    kept_BV = strong_BV > -torch.inf if alpha == 0 else plausible(strong_BV, alpha)
    return torch.where(kept_BV, strong_BV.log_softmax(-1) - weak_BV.log_softmax(-1), -torch.inf)
