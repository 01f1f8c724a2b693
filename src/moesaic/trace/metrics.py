"""Routing metrics: pure functions of picks and loads. `max_violation` and `routing_entropy` stand in `layer.balance`.

Throughout, index_TK holds picked experts, and a pick equal to N is no expert and is never counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from moesaic.errors import ConfigError


@dataclass(frozen=True)
class TokenShare:
    """How one token of the vocabulary goes to one expert.

    Attributes:
        token_id: the token.
        count: how often this token picked this expert.
        lift: share of the token among the expert's picks, over its share among all tokens; 1 is no preference.
    """

    token_id: int
    count: int
    lift: float


@dataclass(frozen=True)
class FrequencyBucket:
    """Tokens of the vocabulary that occur about equally often.

    Attributes:
        least: occurrences of the rarest of them.
        most: occurrences of the most frequent of them.
        tokens: occurrences of all of them together.
        experts: experts that one occurrence ran on average.
    """

    least: int
    most: int
    tokens: int
    experts: float


def experts_per_token(index_TK: Tensor, num_experts: int) -> Tensor:
    """Number of experts that each token ran, int64 (T,): its picks that are an expert."""
    return (index_TK < num_experts).sum(-1)


def experts_by_frequency(
    index_TK: Tensor, token_ids_T: Tensor, num_experts: int, buckets: int = 5
) -> list[FrequencyBucket]:
    """Mean number of experts run for rare and for frequent tokens, rarest first.

    The vocabulary is sorted by its occurrences in the trace and cut where each bucket holds about T / buckets of them;
    tokens that occur equally often stay together, so there may be fewer buckets.
    """
    if not len(token_ids_T):
        return []
    _, vocabulary_T, occurrences_V = torch.unique(token_ids_T, return_inverse=True, return_counts=True)
    frequency_T = occurrences_V[vocabulary_T]
    sorted_T = frequency_T.sort().values
    ends = (torch.arange(1, buckets + 1) * len(sorted_T) // buckets - 1).clamp(min=0)
    limits = sorted_T[ends].unique()
    bucket_T = torch.bucketize(frequency_T, limits)
    experts_T = experts_per_token(index_TK, num_experts).to(torch.float64)
    return [
        FrequencyBucket(
            least=int(frequency_T[inside_T].min()),
            most=int(frequency_T[inside_T].max()),
            tokens=int(inside_T.sum()),
            experts=float(experts_T[inside_T].mean()),
        )
        for inside_T in (bucket_T == number for number in range(len(limits)))
    ]


def load_shares(load_N: Tensor) -> Tensor:
    """f_i = n_i / sum_j n_j, float64 (N,): 1 / N everywhere when balanced; zeros if there was no pick."""
    return load_N.to(torch.float64) / load_N.sum().clamp(min=1)


def relative_load(load_N: Tensor) -> Tensor:
    """N f_i = n_i / mean_j n_j, float64 (N,): 1 when balanced, 0 for an unused expert, its maximum is MaxVio + 1."""
    return load_shares(load_N) * load_N.numel()


def null_share(chosen_M: Tensor, num_experts: int) -> float:
    """Share of the selections that went to null experts, the columns from `num_experts` on; 0 without a selection.

    Balanced picks of N experts and m nulls give m / (N + m).
    """
    return float(chosen_M[num_experts:].sum() / chosen_M.sum().clamp(min=1))


def drop_rate(chosen_M: Tensor, num_experts: int, dropped: int) -> float:
    """Share of the picks of experts that a capacity dropped; picks of null experts can't be. 0 without a pick."""
    return dropped / max(int(chosen_M[:num_experts].sum()), 1)


def drop_rate_by_position(picks_P: Tensor, dropped_P: Tensor, *, parts: int | None = None) -> Tensor:
    """Share of the picks at each position that were dropped, float64; NaN where nothing was picked.

    Drop towards the end in OpenMoE (arXiv 2402.01739, figure 12): position p counts the sequences that
    are longer than p, so the last entries rest on few.

    Args:
        picks_P: picks by bucket of positions, as in `PositionCounts`.
        dropped_P: dropped picks by bucket.
        parts: sum up this many equal stretches of the positions instead, 4 for quarters. The length P need not be a
            multiple; with fewer buckets than parts some stay empty.
    """
    if parts is not None:
        part_P = torch.arange(len(picks_P)) * parts // max(len(picks_P), 1)
        picks_P, dropped_P = (
            torch.zeros(parts, dtype=torch.int64).index_add(0, part_P, counts_P.to(torch.int64))
            for counts_P in (picks_P, dropped_P)
        )
    return dropped_P.to(torch.float64) / picks_P.to(torch.float64)


def coactivation_counts(index_TK: Tensor, num_experts: int) -> Tensor:
    """n_ij = number of tokens that picked both i and j, int64 (N, N), symmetric; the diagonal is n_i.

    The experts of a token must differ, as top-k routers guarantee.
    """
    size = num_experts + 1
    counts = torch.zeros(size * size, dtype=torch.int64)
    # One pair of columns at a time: all K * K pairs of all tokens at once would need K times the memory of the trace.
    for first in index_TK.unbind(-1):
        for second in index_TK.unbind(-1):
            counts += torch.bincount(first * size + second, minlength=size * size)
    return counts.view(size, size)[:num_experts, :num_experts]


def coactivation(index_TK: Tensor, num_experts: int) -> Tensor:
    """C_ij = n_ij / n_i for i != j, 0 on the diagonal, float64 (N, N).

    Row i reads: of the tokens that picked expert i, the share that also picked j. With K picks for every token each row
    of a used expert sums to K - 1; picks made independently and evenly give (K - 1) / (N - 1) in every cell.
    """
    counts_NN = coactivation_counts(index_TK, num_experts)
    load_N1 = counts_NN.diagonal().clamp(min=1).unsqueeze(-1)
    return (counts_NN / load_N1.to(torch.float64)).fill_diagonal_(0.0)


def top_tokens(
    index_TK: Tensor,
    token_ids_T: Tensor,
    num_experts: int,
    *,
    by: Literal["count", "lift"] = "lift",
    top: int = 10,
    minimum: int = 1,
) -> list[list[TokenShare]]:
    """The tokens that each expert sees most, or prefers most, best first; a list for each expert.

    With n_te the number of times that token t picked expert e, n_e = sum_t n_te, n_t the occurrences of t among the T
    tokens: count = n_te and lift = (n_te / n_e) / (n_t / T). Ties go to the higher count, then to the lower token id.

    Args:
        index_TK: picks.
        token_ids_T: token id of each row of `index_TK`.
        num_experts: N.
        by: what to rank by.
        top: length of each list at most.
        minimum: leave out tokens with n_te below this; a lift from one or two occurrences is chance.

    Raises:
        ConfigError: if the picks and the token ids are of different length.
    """
    tokens, top_k = index_TK.shape
    if len(token_ids_T) != tokens:
        raise ConfigError("token_ids_T", len(token_ids_T), "is not the number of routed tokens", f"pass {tokens} ids")
    ids_V, vocabulary_T, occurrences_V = torch.unique(token_ids_T, return_inverse=True, return_counts=True)
    expert_S = index_TK.reshape(-1)
    picked_S = expert_S < num_experts
    # Only pairs that occur are counted: a dense (vocabulary, N) table would be mostly zeros.
    key_S = expert_S * len(ids_V) + vocabulary_T.repeat_interleave(top_k)
    key_P, count_P = (pairs.numpy() for pairs in torch.unique(key_S[picked_S], return_counts=True))
    expert_P, vocabulary_P = np.divmod(key_P, max(len(ids_V), 1))
    load_P = np.bincount(expert_S[picked_S].numpy(), minlength=num_experts)[expert_P]
    lift_P = count_P * float(tokens) / (load_P * occurrences_V.numpy()[vocabulary_P].astype(np.float64))
    rank_P = lift_P if by == "lift" else count_P
    best: list[list[TokenShare]] = [[] for _ in range(num_experts)]
    for pair in np.lexsort((vocabulary_P, -count_P, -rank_P)):
        chosen = best[expert_P[pair]]
        if count_P[pair] >= minimum and len(chosen) < top:
            token_id = int(ids_V[int(vocabulary_P[pair])])
            chosen.append(TokenShare(token_id, int(count_P[pair]), float(lift_P[pair])))
    return best
