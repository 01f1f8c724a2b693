"""The tokens that each expert sees most, or prefers most."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.trace.counts.routing import LayerCounts


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
    load_N = np.bincount(expert_S[picked_S].numpy(), minlength=num_experts)
    return _best(
        expert_P, vocabulary_P, count_P, load_N, ids_V.numpy(), occurrences_V.numpy(), tokens, by, top, minimum
    )


def token_clusters(
    counts: LayerCounts,
    *,
    group: str = "token",
    first: bool = False,
    by: Literal["count", "lift"] = "count",
    top: int = 10,
    minimum: int = 1,
) -> list[list[TokenShare]]:
    """The same from counts, for each of the M columns (OpenMoE, arXiv 2402.01739, tables 9 and 15, which rank by count).

    By count, frequent tokens appear for many experts: the lift beside it tells whether the expert prefers them.

    Args:
        counts: of the layer.
        group: "token" for the token itself, "next" for what follows it, ...
        first: first choices only.
        by: what to rank by.
        top: length of each list at most.
        minimum: leave out tokens that the expert saw less often.
    """
    table = counts.group(group)
    count_P = (table.first_P if first else table.chosen_P).numpy()
    load_M = (counts.first_M if first else counts.chosen_M).numpy()
    return _best(
        *(table.column_P.numpy(), table.group_P.numpy(), count_P, load_M),
        *(table.label_G.numpy(), table.tokens_G.numpy(), counts.tokens, by, top, minimum),
    )


def _best(
    expert_P: np.ndarray,
    vocabulary_P: np.ndarray,
    count_P: np.ndarray,
    load_N: np.ndarray,
    ids_V: np.ndarray,
    occurrences_V: np.ndarray,
    tokens: int,
    by: Literal["count", "lift"],
    top: int,
    minimum: int,
) -> list[list[TokenShare]]:
    """The lists, from pairs of an expert and an index into the vocabulary."""
    kept_P = count_P >= max(minimum, 1)
    expert_P, vocabulary_P, count_P = expert_P[kept_P], vocabulary_P[kept_P], count_P[kept_P]
    lift_P = count_P * float(tokens) / (load_N[expert_P] * occurrences_V[vocabulary_P].astype(np.float64))
    rank_P = lift_P if by == "lift" else count_P
    order_P = np.lexsort((vocabulary_P, -count_P, -rank_P, expert_P))
    starts_N = np.searchsorted(expert_P[order_P], np.arange(len(load_N) + 1))
    return [
        [
            TokenShare(int(ids_V[vocabulary_P[pair]]), int(count_P[pair]), float(lift_P[pair]))
            for pair in order_P[start : min(start + top, end)]
        ]
        for start, end in itertools.pairwise(starts_N)
    ]
