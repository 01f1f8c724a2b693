"""`replay(model, trace)`: run a model with the picks of a trace in place of its routers' own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesaic.errors import ConfigError, TraceError, UnsupportedOverride
from moesaic.hf.overridable import Overridable, overridable
from moesaic.layer import MoEBlock, Router, Routing, RoutingContext, routing_at
from moesaic.trace.facts import facts_of
from moesaic.trace.header import LayerFacts, TraceHeader
from moesaic.trace.lookup import TraceLookup
from moesaic.trace.numbering import DocumentNumbering
from moesaic.trace.rows import NOTHING, RoutingLog

Weights = Literal["router", "trace"]


@contextlib.contextmanager
def replay(
    model: nn.Module, trace: RoutingLog, *, weights: Weights = "router", documents: Sequence[int] | None = None
) -> Iterator[None]:
    """Run everything that `model` computes inside the block with the picks of a trace.

        with moesaic.record(model) as trace:
            model(input_ids)
        with moesaic.replay(model, trace):
            loss = model(input_ids, labels=input_ids).loss
        loss.backward()

    A token is found by its document and position, so batches, padding and packing may be others than when the trace was
    recorded. Documents are numbered as they arrive in this block, as `record` numbers them. Null experts and dropped picks
    come from the trace too: the model's own capacity drops nothing. Padding keeps the routing of its router. Blocks may be
    nested, and the innermost decides. Layers that are recomputed after the block have the picks of their forward pass.

    Memory: the picks are held on the CPU, 2 K bytes for each token and layer (6 K with weights="trace"), of all documents
    or of those that `documents` names; from files too, which are read once.

    Args:
        model: a moesaic model, a stock MoE model of transformers whose routers return picks and weights, or a module that
            holds one. Stock models are replayed by hooks, and weigh picks by their family's rule.
        trace: picks of the same text through the same layers.
        weights: "router" weighs the picks by the rule and the present scores of the model's routers, so that gradients
            reach them; "trace" takes the stored weights, as constants.
        documents: the trace's document for each document that arrives, in order; None if they are the same. Say in it
            which documents come again, as in several epochs.

    Raises:
        TraceError: if layers, experts, picks or null experts of trace and model differ; in a forward pass, if the trace
            has another token id at a position, or does not hold it.
        ConfigError: if `weights` is neither choice, or asks for what trace or routers can't give.
        UnsupportedModel: if `model` has no MoE layer, or is of a family whose routing can't be read.
        UnsupportedOverride: if its routers mix or merge experts, can't say the weights of given picks, or return no picks
            that could be replaced.
    """
    if weights not in ("router", "trace"):
        raise ConfigError("weights", weights, "is not one of the choices", "choose 'router' or 'trace'")
    found = overridable(model)
    with found.override_routing(replay_of(model, found, trace, weights=weights, documents=documents)):
        yield


def replay_of(
    model: nn.Module,
    found: Overridable,
    trace: RoutingLog,
    *,
    weights: Weights,
    documents: Sequence[int] | None,
    any_k: bool = False,
) -> Replay:
    """What makes the override of each forward pass in a replay.

    Args:
        model: as for `replay`, which says what is refused.
        found: what `overridable` found in it.
        trace: as for `replay`.
        weights: as for `replay`.
        documents: as for `replay`.
        any_k: take traces with other numbers of picks for each token, as overridden models record them.
    """
    for layer, router in found.routers.items():
        _check_router(layer, router, weights)
    _check_depth(model)
    check_fits(trace.header, facts_of(model).layers, any_k=any_k)
    lookup = TraceLookup(trace, documents=documents, weights=weights == "trace")
    if weights == "trace":
        _check_weights(lookup)
    return Replay(lookup, found.limited, documents)


class Replay:
    """Finds the tokens of each forward pass in a trace.

    Args:
        lookup: the trace, with the weights to be used, if any.
        limited: layers with a capacity, which is to drop nothing.
        documents: as for `replay`.
    """

    def __init__(self, lookup: TraceLookup, limited: frozenset[int], documents: Sequence[int] | None = None) -> None:
        self._lookup, self._limited = lookup, limited
        self._numbering = DocumentNumbering()
        self._document_D = None if documents is None else torch.tensor(list(documents), dtype=torch.int64)

    def __call__(self, context: RoutingContext, num_tokens: int) -> ReplayedPass:
        tokens = self._numbering.columns(context, num_tokens=num_tokens)
        document_T = self._named(tokens.document_T)
        row_T = {}
        for layer, picks in self._lookup.layers.items():
            shared = next(
                (row for other, row in row_T.items() if self._lookup.layers[other].key_T is picks.key_T), None
            )
            if shared is None:
                shared = self._lookup.rows_of(layer, document_T, tokens.position_T)
            row_T[layer] = shared
        first = min(row_T, default=None)
        if first is None:
            self._lookup.rows_of(min(self._lookup.header.layers), document_T, tokens.position_T)
        else:
            self._check_tokens(self._lookup.token_T(row_T[first]), tokens.token_T, document_T, tokens.position_T)
        return ReplayedPass(self._lookup, row_T, self._limited, context.mask_T)

    def _named(self, document_T: Tensor) -> Tensor:
        """The trace's documents for those that arrived."""
        if self._document_D is None:
            return document_T
        arrived = int(document_T.max()) + 1 if len(document_T) else 0
        if arrived > len(self._document_D):
            raise TraceError(
                f"{arrived} documents have arrived, and `documents` names {len(self._document_D)}; name one for each "
                "sequence, or each document packed in it, that the model is given inside the block"
            )
        return self._document_D[document_T]

    @staticmethod
    def _check_tokens(held_T: Tensor, given_T: Tensor, document_T: Tensor, position_T: Tensor) -> None:
        other_T = (held_T != given_T) & (held_T != NOTHING) & (given_T != NOTHING)
        if other_T.any():
            where = int(other_T.nonzero()[0])
            raise TraceError(
                f"document {int(document_T[where])}, position {int(position_T[where])}: the trace has token "
                f"{int(held_T[where])}, and the model was given {int(given_T[where])}; replay the text that was recorded, "
                "with the same tokenizer, and name its documents with `documents` if they come in another order"
            )


@dataclass(frozen=True, eq=False)
class ReplayedPass:
    """The override of one forward pass.

    Attributes:
        lookup: the trace.
        row_T: rows of its real tokens in the lookup, by layer.
        limited: layers with a capacity.
        mask_T: real tokens; None for all.
    """

    lookup: TraceLookup
    row_T: Mapping[int, Tensor]
    limited: frozenset[int]
    mask_T: Tensor | None

    def __call__(self, layer: int, router: Router, routing: Routing, context: RoutingContext) -> Routing:
        picks, row_T = self.lookup.layers[layer], self.row_T[layer]
        device = routing.index_TK.device
        choice_TK = picks.choice_TK[row_T].to(device=device, dtype=torch.int64)
        choice_TK = choice_TK.masked_fill(choice_TK == NOTHING, routing.num_columns)
        choice_TK = self._among(choice_TK, routing.choice_TK, routing.num_columns)
        weight_TK = dropped_TK = None
        if picks.weight_TK is not None:
            taken_TK = picks.weight_TK[row_T].to(device=device, dtype=routing.weight_TK.dtype)
            weight_TK = self._among(taken_TK, routing.weight_TK.detach(), 0)
        if picks.dropped_TK is not None:
            none_TK = torch.zeros_like(routing.index_TK, dtype=torch.bool)
            dropped_TK = self._among(picks.dropped_TK[row_T].to(device), none_TK, 0)
        elif layer in self.limited:
            dropped_TK = torch.zeros_like(choice_TK, dtype=torch.bool)
        return routing_at(router, routing, choice_TK, weight_TK=weight_TK, dropped_TK=dropped_TK)

    def _among(self, real_RK: Tensor, own_TK: Tensor, fill: int) -> Tensor:
        """Values of real tokens, and of padding its own, as wide as the wider of the two."""
        if self.mask_T is None:
            return real_RK
        width = max(real_RK.shape[1], own_TK.shape[1])
        real_RK, own_TK = (F.pad(values, (0, width - values.shape[1]), value=fill) for values in (real_RK, own_TK))
        return own_TK.index_copy(0, self.mask_T.nonzero().squeeze(-1).to(own_TK.device), real_RK)


def check_fits(header: TraceHeader, layers: Mapping[int, LayerFacts], *, any_k: bool = False) -> None:
    """Refuse a trace of other layers.

    Args:
        header: of the trace.
        layers: those of the model.
        any_k: let numbers of picks for each token differ.

    Raises:
        TraceError: naming both.
    """
    if set(header.layers) != set(layers):
        raise TraceError(
            f"the trace holds MoE layers {sorted(header.layers)}, and the model has {sorted(layers)}; replay the trace "
            "with the model that it was recorded from, or one of the same shape"
        )
    for layer, ours in layers.items():
        theirs = header.layers[layer]
        names = {"num_experts": "experts", "num_null": "null experts", "top_k": "picks for each token"}
        for name, what in names.items():
            held, needed = getattr(theirs, name), getattr(ours, name)
            if name == "top_k" and any_k:
                continue
            # Where the width of the record depends on the data, the model's is the most that there can be.
            if held > needed or (held != needed and not (name == "top_k" and ours.router == "expert_choice")):
                raise TraceError(
                    f"layer {layer}: the trace has {held} {what}, and the model has {needed}; replay the trace with the "
                    "model that it was recorded from, or one of the same shape"
                )


def _check_router(layer: int, router: Router, weights: Weights) -> None:
    if weights == "router" and not router.says_weights:
        raise UnsupportedOverride(
            f'router {router.config.type} of layer {layer} can\'t say the weights of given picks; choose weights="trace"'
        )
    if weights == "trace" and getattr(router.config, "null_output", "zero") == "identity":
        raise ConfigError(
            "weights",
            weights,
            f"needs the weights with which null experts of layer {layer} pass tokens on, which no trace holds",
            'choose weights="router"',
        )


def _check_depth(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, MoEBlock) and module.depth is not None:
            raise UnsupportedOverride(
                f"layer {module.layer} lets some tokens pass by (mixture of depths), and a trace does not say with which "
                "weight the others passed; train and replay without moe.depth"
            )


def _check_weights(lookup: TraceLookup) -> None:
    for layer, picks in lookup.layers.items():
        assert picks.weight_TK is not None
        if picks.weight_TK.isnan().any():
            raise ConfigError(
                "weights",
                "trace",
                f"asks for weights that the trace does not know in layer {layer}",
                'choose weights="router"',
            )
