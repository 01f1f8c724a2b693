"""Recorded texts for the explorer: which documents, and their routing in all layers, within a bounded size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from moesaic.trace.header import LayerFacts
from moesaic.trace.rows import RoutingLog, Rows

BUDGET = 1_200_000
"""Bytes of all texts together in the page, before they are written as text, which takes a third more."""
LONGEST = 512
MOST = 48


@dataclass
class Document:
    """One recorded text, or its beginning.

    Attributes:
        number: of the document in the trace.
        domain: number of its domain.
        length: recorded tokens, of which the first T are here.
        token_T: token ids, int64.
        position_T: positions, int64.
        turn_T: turns, int64, -1 where nobody said.
        choice_LTK: selections by layer, -1 for nothing.
        weight_LTK: their weights.
        dropped_LTK: whether they were dropped.
        entropy_LT: of the scores if the trace has them, else of the weights, over its maximum: 0 to 1.
    """

    number: int
    domain: int
    length: int
    token_T: np.ndarray
    position_T: np.ndarray
    turn_T: np.ndarray
    choice_LTK: np.ndarray
    weight_LTK: np.ndarray
    dropped_LTK: np.ndarray
    entropy_LT: np.ndarray


def chosen_documents(
    log: RoutingLog, *, budget: int = BUDGET, longest: int = LONGEST, most: int = MOST
) -> list[Document]:
    """Texts of every domain in turn, domains with little text first, until the budget is used up.

    Args:
        log: the trace; read twice, the first time only one layer of it.
        budget: bytes at most, at four a pick.
        longest: tokens at most of one text.
        most: texts at most.
    """
    layers = log.header.layers
    width = max(facts.top_k for facts in layers.values())
    tokens = max(budget // (len(layers) * (4 * width + 1)), 1)
    found: list[Document] = []
    for number, domain, length in _order(_lengths(log)):
        size = min(length, longest, tokens)
        if not size or len(found) >= most:
            break
        tokens -= size
        found.append(_empty(number, domain, length, size, len(layers), width))
    _fill(log, {document.number: document for document in found})
    return found


def _lengths(log: RoutingLog) -> list[tuple[int, int, int]]:
    """Number, domain and length of every document, in order of arrival."""
    first = min(log.header.layers)
    lengths: dict[int, int] = {}
    domains: dict[int, int] = {}
    for rows in log.rows([first]):
        numbers, at, counts = np.unique(rows.tokens.document_T.numpy(), return_index=True, return_counts=True)
        for number, where, count in zip(numbers.tolist(), at.tolist(), counts.tolist(), strict=True):
            lengths[number] = lengths.get(number, 0) + count
            domains.setdefault(number, int(rows.tokens.domain_T[where]))
    return [(number, domains[number], length) for number, length in sorted(lengths.items())]


def _order(documents: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """One of each domain in turn; domains with the least text first."""
    by_domain: dict[int, list[tuple[int, int, int]]] = {}
    for document in documents:
        by_domain.setdefault(document[1], []).append(document)
    queues = sorted(by_domain.values(), key=lambda queue: sum(length for _, _, length in queue))
    rounds = max(map(len, queues), default=0)
    return [queue[turn] for turn in range(rounds) for queue in queues if turn < len(queue)]


def _empty(number: int, domain: int, length: int, size: int, layers: int, width: int) -> Document:
    shape = (layers, size, width)
    return Document(
        number=number,
        domain=domain,
        length=length,
        token_T=np.full(size, -1),
        position_T=np.zeros(size, dtype=np.int64),
        turn_T=np.full(size, -1),
        choice_LTK=np.full(shape, -1),
        weight_LTK=np.zeros(shape, dtype=np.float32),
        dropped_LTK=np.zeros(shape, dtype=bool),
        entropy_LT=np.zeros(shape[:2], dtype=np.float32),
    )


def _fill(log: RoutingLog, documents: dict[int, Document]) -> None:
    order = {layer: index for index, layer in enumerate(sorted(log.header.layers))}
    filled: dict[tuple[int, int], int] = {}
    wanted = torch.tensor(sorted(documents), dtype=torch.int64)
    for rows in log.rows():
        here_T = torch.isin(rows.tokens.document_T, wanted)
        if not here_T.any():
            continue
        mine = rows[here_T]
        entropy_T = _entropy(mine, log.header.layers[rows.layer])
        for number in mine.tokens.document_T.unique().tolist():
            of_T = mine.tokens.document_T == number
            start = filled.get((rows.layer, number), 0)
            filled[rows.layer, number] = start + int(of_T.sum())
            _copy(documents[number], order[rows.layer], start, mine[of_T], entropy_T[of_T])


def _copy(document: Document, layer: int, start: int, rows: Rows, entropy_T: torch.Tensor) -> None:
    size = min(len(rows), len(document.token_T) - start)
    if size <= 0:
        return
    here, width = slice(start, start + size), rows.choice_TK.shape[1]
    document.token_T[here] = rows.tokens.token_T[:size].numpy()
    document.position_T[here] = rows.tokens.position_T[:size].numpy()
    document.turn_T[here] = rows.tokens.turn_T[:size].numpy()
    document.choice_LTK[layer, here, :width] = rows.choice_TK[:size].numpy()
    # Weights that are not known, as of imported traces, are shown as 0.
    document.weight_LTK[layer, here, :width] = np.nan_to_num(rows.weight_TK[:size].numpy())
    if rows.dropped_TK is not None:
        document.dropped_LTK[layer, here, :width] = rows.dropped_TK[:size].numpy()
    document.entropy_LT[layer, here] = np.nan_to_num(entropy_T[:size].numpy())


def _entropy(rows: Rows, facts: LayerFacts) -> torch.Tensor:
    """Entropy of the scores, or else of the weights of the selections, over its maximum."""
    known, size = (rows.weight_TK, facts.top_k) if rows.scores_TM is None else (rows.scores_TM, facts.num_columns)
    share = known.double().clamp(min=0)
    share = share / share.sum(-1, keepdim=True).clamp(min=1e-12)
    return torch.special.entr(share).sum(-1) / np.log(max(size, 2))


def readable(documents: Sequence[Document]) -> int:
    """Tokens of all texts."""
    return sum(len(document.token_T) for document in documents)
