"""Plans that share tokens out among experts under limits on both: entropic transport.

All run in the log domain, without gradient, over groups of tokens: a sequence or a batch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Log of the share of padding. Finite, so that differences of two of them are not NaN.
_NOTHING = -1e30


@torch.no_grad()
def capped_plan(
    scores_GLN: Tensor, mask_GL: Tensor, tokens_G: Tensor, cap: int, *, entropy: float, iterations: int
) -> Tensor:
    """Log of the plan A that maximises <S, A> + entropy * H(A), shape (G, L, N).

    Each expert's shares sum to `tokens_G`, a token's to at most `cap`, and no share exceeds 1 (Expert Choice, arXiv
    2202.09368, eq. 2). As there, the three limits are met in turn (Dykstra's algorithm), but written as prices of what
    they limit, A = exp((S - prices) / entropy). Prices stay valid when the entropy's weight changes, so that it starts
    at the largest score and falls to its value over half of the rounds: with a small weight from the beginning, prices
    move by about that weight in a round, and 100 rounds may do nothing.

    Args:
        scores_GLN: S, none of them negative.
        mask_GL: False for padding, which gets no share.
        tokens_G: tokens that each expert takes in each group.
        cap: limit on a token's shares.
        entropy: weight of the entropy; the smaller, the closer to the best plan of zeros and ones.
        iterations: rounds of the three updates.
    """
    if not scores_GLN.numel():
        return scores_GLN
    scores_GLN = scores_GLN.masked_fill(~mask_GL.unsqueeze(-1), _NOTHING)
    log_tokens_G11 = tokens_G.clamp(min=1).to(scores_GLN.dtype).log().view(-1, 1, 1)
    token_GL1, share_GLN = torch.zeros_like(scores_GLN[..., :1]), torch.zeros_like(scores_GLN)
    expert_G1N = torch.zeros_like(scores_GLN[:, :1])
    largest_G11 = scores_GLN.amax((1, 2), keepdim=True).clamp(min=entropy)
    for step in range(iterations):
        done = min(1.0, 2 * (step + 1) / iterations)
        weight_G11 = largest_G11 ** (1 - done) * entropy**done
        open_GLN = (scores_GLN - token_GL1 - share_GLN) / weight_G11
        expert_G1N = weight_G11 * (open_GLN.logsumexp(1, keepdim=True) - log_tokens_G11)
        open_GLN = (scores_GLN - expert_G1N - share_GLN) / weight_G11
        token_GL1 = (weight_G11 * (open_GLN.logsumexp(-1, keepdim=True) - math.log(cap))).clamp(min=0)
        share_GLN = (scores_GLN - expert_G1N - token_GL1).clamp(min=0)
    return (scores_GLN - expert_G1N - token_GL1 - share_GLN) / entropy


@torch.no_grad()
def balanced_plan(logits_GLN: Tensor, mask_GL: Tensor, *, iterations: int) -> Tensor:
    """Log of the plan P that maximises <logits, P> + H(P), shape (G, L, N): Sinkhorn's algorithm.

    A token's shares sum to 1 and an expert's to the same number for all experts. The last projection is that of the
    tokens, so theirs are exact.

    Args:
        logits_GLN: what the plan is to follow; divide it by a temperature to weigh the entropy.
        mask_GL: False for padding, which gets no share.
        iterations: rounds of both projections.
    """
    plan_GLN = logits_GLN.masked_fill(~mask_GL.unsqueeze(-1), _NOTHING)
    tokens_G11 = mask_GL.sum(1).clamp(min=1).to(plan_GLN.dtype).view(-1, 1, 1)
    log_load_G11 = (tokens_G11 / logits_GLN.shape[-1]).log()
    for _ in range(iterations):
        plan_GLN = plan_GLN - plan_GLN.logsumexp(1, keepdim=True) + log_load_G11
        plan_GLN = plan_GLN - plan_GLN.logsumexp(-1, keepdim=True)
        plan_GLN = plan_GLN.masked_fill(~mask_GL.unsqueeze(-1), _NOTHING)
    return plan_GLN
