"""The balanced linear assignment: tokens to experts, equally many to each, with the largest total score. Exact.

An assignment is the best one for its own loads exactly if no cycle of experts, each handing one of its tokens to the
next, raises the total. So it is enough to start at any assignment by prices (argmax of score minus the expert's price
is the best for whatever loads it gives) and to hand tokens along the best path from an expert with too many to one with
too few, until none has: such paths keep that property. Prices come from a few rounds of Sinkhorn's algorithm, which
leave few tokens to move.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from moesaic.layer.routers.parts.plans import balanced_plan

_ROUNDS = 40


def balanced_assignment(scores_GLN: Tensor, mask_GL: Tensor) -> Tensor:
    """Expert of each token, int64 (G, L); N for padding.

    In each group every expert gets T // N or T // N + 1 of the T real tokens, and among all such assignments the total
    score is the largest. Deterministic. Runs on the CPU; tensors of other devices are copied.

    Args:
        scores_GLN: score of each token with each expert; must be finite where the mask is True.
        mask_GL: False for padding.
    """
    return torch.ops.moesaic.balanced_assignment(scores_GLN.detach(), mask_GL)


@torch.library.custom_op("moesaic::balanced_assignment", mutates_args=())
def _balanced_assignment(scores_GLN: Tensor, mask_GL: Tensor) -> Tensor:
    index_GL = torch.full(mask_GL.shape, scores_GLN.shape[-1], dtype=torch.int64)
    for group, mask_L in enumerate(mask_GL.cpu()):
        scores_TN = scores_GLN[group].cpu()[mask_L].to(torch.float64)
        if scores_TN.numel():
            index_GL[group, mask_L] = _assign(scores_TN)
    return index_GL.to(scores_GLN.device)


@_balanced_assignment.register_fake
def _(scores_GLN: Tensor, mask_GL: Tensor) -> Tensor:
    return torch.empty_like(mask_GL, dtype=torch.int64)


def _assign(scores_TN: Tensor) -> Tensor:
    """Expert of each of the T tokens of one group."""
    tokens, experts = scores_TN.shape
    least, most = tokens // experts, -(-tokens // experts)
    spread = float(scores_TN.std(correction=0)) or 1.0
    # Gains below this are rounding.
    tolerance = 1e-12 * float(scores_TN.abs().max()) * experts
    index_T = _start(scores_TN, spread)
    state = _Loads(scores_TN, index_T)
    while True:
        load_N = state.load_N
        if bool((load_N > most).any()):
            sources_N, sinks_N, wanted = load_N > most, load_N < most, -torch.inf
        elif bool((load_N < least).any()):
            sources_N, sinks_N, wanted = load_N > least, load_N < least, -torch.inf
        elif least < most:
            # Loads are right; which experts have one token more is still open.
            sources_N, sinks_N, wanted = load_N > least, load_N < most, tolerance
        else:
            return state.index_T
        path = _best_path(state.gain_NN, sources_N, sinks_N, wanted, tolerance)
        if path is None:
            return state.index_T
        state.hand_over(path)


def _start(scores_TN: Tensor, spread: float) -> Tensor:
    """The assignment by prices that nearly balance loads."""
    mask_GL = torch.ones(1, scores_TN.shape[0], dtype=torch.bool)
    plan_TN = balanced_plan(scores_TN.unsqueeze(0) / (0.05 * spread), mask_GL, iterations=_ROUNDS).squeeze(0)
    # Where experts are equal to a token, they take turns: else the first would get all such tokens.
    tokens, experts = scores_TN.shape
    turn_T1 = (torch.arange(tokens) % experts).unsqueeze(-1)
    return plan_TN.scatter_add(-1, turn_T1, torch.full((tokens, 1), 1e-12, dtype=plan_TN.dtype)).argmax(-1)


class _Loads:
    """Tokens of each expert, and what it gains the total if an expert hands its best token for that to another."""

    def __init__(self, scores_TN: Tensor, index_T: Tensor) -> None:
        experts = scores_TN.shape[1]
        self.scores_TN, self.index_T = scores_TN, index_T
        self.load_N = torch.bincount(index_T, minlength=experts)
        self.gain_NN = torch.full((experts, experts), -torch.inf, dtype=scores_TN.dtype)
        self.token_NN = torch.zeros(experts, experts, dtype=torch.int64)
        for expert in range(experts):
            self._update(expert)

    def _update(self, expert: int) -> None:
        token_S = (self.index_T == expert).nonzero().flatten()
        if not token_S.numel():
            self.gain_NN[expert] = -torch.inf
            return
        scores_SN = self.scores_TN[token_S]
        gain_N, best_N = (scores_SN - scores_SN[:, expert : expert + 1]).max(0)
        gain_N[expert] = -torch.inf
        self.gain_NN[expert], self.token_NN[expert] = gain_N, token_S[best_N]

    def hand_over(self, path: list[int]) -> None:
        """Each expert on the path gives a token to the next."""
        moves = [(int(self.token_NN[giver, taker]), taker) for giver, taker in pairwise(path)]
        for token, taker in moves:
            self.index_T[token] = taker
        self.load_N[path[0]] -= 1
        self.load_N[path[-1]] += 1
        for expert in path:
            self._update(expert)


def _best_path(
    gain_NN: Tensor, sources_N: Tensor, sinks_N: Tensor, wanted: float, tolerance: float
) -> list[int] | None:
    """The path from a source to a sink with the largest gain, if that is above `wanted` (Bellman and Ford)."""
    reached_N = torch.where(sources_N, 0.0, -torch.inf).to(gain_NN.dtype)
    parents: list[Tensor] = []
    for _ in range(len(gain_NN) - 1):
        longer_N, parent_N = (reached_N.unsqueeze(1) + gain_NN).max(0)
        better_N = longer_N > reached_N + tolerance
        if not bool(better_N.any()):
            break
        reached_N = torch.where(better_N, longer_N, reached_N)
        parents.append(torch.where(better_N, parent_N, -1))
    gain, end = torch.where(sinks_N, reached_N, -torch.inf).max(0)
    if not float(gain) > wanted:
        return None
    path = [int(end)]
    for parent_N in reversed(parents):
        parent = int(parent_N[path[0]])
        if parent >= 0:
            path.insert(0, parent)
    return path
