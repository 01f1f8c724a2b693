"""Routing logs for tests of counts and metrics: the worked table R, random ones, and logs cut into batches."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from moesaic.trace.header import LayerFacts, TraceHeader
from moesaic.trace.rows import Rows, TokenColumns

R_IDS = [5, 7, 5, 9, 7, 5, 9, 5]
R_PICKS = [(0, 1), (2, 3), (0, 1), (1, 2), (2, 0), (0, 3), (1, 0), (1, 0)]
Q_PICKS = [(0, 2), (2, 3), (1, 0), (3, 2), (0, 2), (3, 0), (2, 3), (0, 1)]


class Log:
    """A routing log of given rows."""

    def __init__(self, header: TraceHeader, rows: Sequence[Rows]) -> None:
        self.header, self._rows = header, rows

    def rows(self, layers: Collection[int] | None = None) -> Iterator[Rows]:
        return (rows for rows in self._rows if layers is None or rows.layer in layers)


def columns(
    ids: Sequence[int] | Tensor,
    lengths: Sequence[int] | None = None,
    *,
    domain: Sequence[int] | None = None,
    turn: Sequence[int] | None = None,
    first_document: int = 0,
) -> TokenColumns:
    """Tokens of documents of these lengths, one after the other; the domain of each document, the turn of each token."""
    token_T = torch.as_tensor(ids, dtype=torch.int32)
    lengths = [len(token_T)] if lengths is None else list(lengths)
    assert sum(lengths) == len(token_T)
    length_D = torch.tensor(lengths)
    document_T = torch.arange(len(lengths)).repeat_interleave(length_D)
    position_T = torch.cat([torch.arange(length) for length in lengths]) if lengths else torch.empty(0)
    domain_D = torch.zeros(len(lengths), dtype=torch.int16) if domain is None else torch.tensor(domain).to(torch.int16)
    unknown_T = torch.full((len(token_T),), -1)
    return TokenColumns(
        document_T=document_T + first_document,
        position_T=position_T.to(torch.int32),
        place_T=position_T.to(torch.int32),
        token_T=token_T,
        domain_T=domain_D[document_T],
        turn_T=(unknown_T if turn is None else torch.tensor(turn)).to(torch.int16),
        modality_T=unknown_T.to(torch.int8),
    )


def log_of(
    tokens: TokenColumns,
    choices: dict[int, Tensor],
    num_experts: int,
    *,
    num_null: int = 0,
    dropped: dict[int, Tensor] | None = None,
    batch: int | None = None,
    domains: tuple[str, ...] = ("",),
) -> Log:
    """A log of these choices by layer, cut into batches of so many rows."""
    facts = {
        layer: LayerFacts(num_experts=num_experts, top_k=choice_TK.shape[1], num_null=num_null, router="top_k")
        for layer, choice_TK in choices.items()
    }
    whole = [
        Rows(layer, tokens, choice_TK.to(torch.int32), torch.rand(choice_TK.shape), (dropped or {}).get(layer))
        for layer, choice_TK in choices.items()
    ]
    size = batch or max(len(tokens), 1)
    cut = [rows[start : start + size] for start in range(0, len(tokens), size) for rows in whole]
    return Log(TraceHeader(layers=facts, domains=domains, vocab_size=0), cut)


def table_r(batch: int | None = None, picks: Sequence[tuple[int, int]] = R_PICKS) -> Log:
    """Table R of the worked numbers: one sequence of 8 tokens, 4 experts, 2 picks; or other picks of the same tokens."""
    return log_of(columns(R_IDS), {0: torch.tensor(picks)}, 4, batch=batch)


def random_log(
    seed: int,
    *,
    lengths: Sequence[int] = (17, 40, 3),
    layers: Sequence[int] = (1, 3),
    num_experts: int = 6,
    top_k: int = 2,
    num_null: int = 0,
    vocabulary: int = 9,
    batch: int | None = None,
    drops: bool = False,
    domains: Sequence[int] | None = None,
    first_document: int = 0,
) -> Log:
    """Uniform picks of random tokens."""
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(lengths)
    ids_T = torch.randint(vocabulary, (tokens,), generator=generator)
    turn_T = torch.randint(3, (tokens,), generator=generator).tolist()
    width = num_experts + num_null
    choices = {
        layer: torch.rand(tokens, width, generator=generator).topk(top_k).indices if tokens else torch.empty(0, top_k)
        for layer in layers
    }
    dropped = None
    if drops:
        dropped = {
            layer: (torch.rand(tokens, top_k, generator=generator) < 0.3) & (choice_TK < num_experts)
            for layer, choice_TK in choices.items()
        }
    names = ("", *(f"domain {number}" for number in range(1, 1 + max(domains or [0]))))
    found = columns(ids_T, lengths, domain=domains, turn=turn_T, first_document=first_document)
    return log_of(found, choices, num_experts, num_null=num_null, dropped=dropped, batch=batch, domains=names)


def same_counts(one, other) -> None:
    """Assert that two `RoutingCounts` are equal in every tensor."""
    assert one.layers.keys() == other.layers.keys()
    for index, layer in one.layers.items():
        same = other.layers[index]
        _same(vars(layer), vars(same), f"layer {index}")
    _same(one.flow, other.flow, "flow")


def _same(one, other, where: str) -> None:
    if isinstance(one, Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key, value in one.items():
            _same(value, other[key], f"{where} {key}")
    elif hasattr(one, "__dataclass_fields__"):
        _same(vars(one), vars(other), where)
    else:
        assert one == other, where
