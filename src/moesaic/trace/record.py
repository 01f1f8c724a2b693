"""`record(model)`: keep the routing of every forward pass that runs inside a `with` block."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesaic.errors import ConfigError
from moesaic.hf.model import RoutingListener
from moesaic.hf.routing_source import routing_source
from moesaic.layer import LayerLoad, Routing, RoutingContext
from moesaic.trace.counts.positions import PositionCounts
from moesaic.trace.facts import facts_of
from moesaic.trace.header import LayerFacts, TraceHeader, tokenizer_fingerprint
from moesaic.trace.labels import Labels
from moesaic.trace.numbering import DocumentNumbering
from moesaic.trace.rows import NOTHING, Rows, TokenColumns, rows_of
from moesaic.trace.sampling import check_sample, sampled
from moesaic.trace.storage.stream import StreamedTrace
from moesaic.trace.storage.writer import TraceWriter

Keep = Literal["counts", "tokens"]


@dataclass
class LayerTrace:
    """Routing of one MoE layer. T counts recorded tokens, padding left out, in the order in which they ran.

    Attributes:
        layer: index of the decoder layer.
        num_experts: N.
        top_k: K; of routers whose tokens have different numbers of picks, the most that a token had.
        num_null: null experts, which come after the N experts among the columns.
        router: kind of router.
        domain_loads: picks that each expert computed by domain, int64 (N,) each; the key is "" outside
            `RoutingTrace.domain`.
        domain_chosen: selections of each column, experts and then null experts, before a capacity dropped any, by
            domain, int64 (M,) each.
        domain_positions: picks and dropped picks by position in the sequence, by domain; empty without a capacity.
        dropped: picks that a capacity dropped.
        unserved: tokens that no expert computed, because all their picks were dropped or null.
        tokens: tokens counted.
        selects: whether tokens select experts; False for soft slots and merged experts.
        has_scores: whether the scores of all columns are kept.
        rows: their routing by forward pass; empty if only counts are kept.
    """

    layer: int
    num_experts: int
    top_k: int
    num_null: int = 0
    router: str = ""
    domain_loads: dict[str, Tensor] = field(default_factory=dict)
    domain_chosen: dict[str, Tensor] = field(default_factory=dict)
    domain_positions: dict[str, PositionCounts] = field(default_factory=dict)
    dropped: int = 0
    unserved: int = 0
    tokens: int = 0
    selects: bool = True
    has_scores: bool = False
    rows: list[Rows] = field(default_factory=list, repr=False)

    @property
    def load_N(self) -> Tensor:
        """Picks of each expert over all domains, int64 (N,); picks of no expert are not counted."""
        return torch.stack(list(self.domain_loads.values())).sum(0)

    @property
    def chosen_M(self) -> Tensor:
        """Selections of each column over all domains, before drops, int64 (M,)."""
        return torch.stack(list(self.domain_chosen.values())).sum(0)

    @property
    def index_TK(self) -> Tensor:
        """Picked experts, int64, N where a pick is no expert or missing. Made anew at each access.

        Raises:
            ConfigError: if only counts were kept.
        """
        return _concatenate(
            _widen([rows.index_TK(self.num_experts) for rows in self.rows], self.top_k, self.num_experts)
        )

    @property
    def weight_TK(self) -> Tensor:
        """Weights of the picks at combine, float32. Made anew at each access.

        Raises:
            ConfigError: if only counts were kept.
        """
        return _concatenate(_widen([rows.weight_TK for rows in self.rows], self.top_k, 0))

    def _add(
        self,
        routing: Routing,
        mask_T: Tensor | None,
        position_T: Tensor | None,
        domain: str,
        tokens: TokenColumns | None,
    ) -> None:
        self.top_k = max(self.top_k, routing.top_k)
        load = LayerLoad.of(routing, mask_T)
        for counts, new in ((self.domain_loads, load.load_N), (self.domain_chosen, load.chosen_M)):
            counts[domain] = counts[domain] + new.cpu() if domain in counts else new.cpu()
        self.dropped += int(load.dropped)
        self.tokens += int(load.tokens)
        self.unserved += int(_real((routing.index_TK == routing.num_experts).all(-1), mask_T).sum())
        if routing.dropped_TK is not None and position_T is not None:
            picks_T = _real((routing.choice_TK < routing.num_experts).sum(-1), mask_T).cpu()
            dropped_T = _real(routing.dropped_TK.sum(-1), mask_T).cpu()
            self.domain_positions.setdefault(domain, PositionCounts()).add(position_T, picks_T, dropped_T)
        if tokens is not None:
            self.rows.append(rows_of(self.layer, routing, tokens, mask_T, scores=self.has_scores))


class RoutingTrace(Labels):
    """What `record` collected: one `LayerTrace` for each MoE layer, and the tokens that were routed.

    Attributes:
        keep: "counts" or "tokens", as given to `record`.
        layers: traces by layer index.
        num_tokens: tokens recorded, padding left out.
    """

    def __init__(self, keep: Keep, facts: TraceHeader | None = None, *, seed: int = 0) -> None:
        super().__init__()
        self.keep: Keep = keep
        self.layers: dict[int, LayerTrace] = {}
        self.num_tokens = 0
        self._numbering = DocumentNumbering()
        self._tokens: list[TokenColumns] = []
        self._facts = facts or TraceHeader(layers={})
        self._seed = seed

    @property
    def header(self) -> TraceHeader:
        """What was traced, with the layers that have run."""
        layers = {
            index: LayerFacts(
                num_experts=layer.num_experts,
                top_k=layer.top_k,
                num_null=layer.num_null,
                router=layer.router,
                selects=layer.selects,
            )
            for index, layer in sorted(self.layers.items())
        }
        return self._facts.model_copy(update={"layers": layers, "domains": tuple(self._domains)})

    def rows(self, layers: Collection[int] | None = None) -> Iterator[Rows]:
        """Every row once, by forward pass and layer, of layers whose tokens select experts; see `RoutingLog`.

        Raises:
            ConfigError: if only counts were kept.
        """
        if self.keep != "tokens":
            raise _no_tokens()
        chosen = [
            layer
            for index, layer in sorted(self.layers.items())
            if layer.selects and (layers is None or index in layers)
        ]
        for step in range(max((len(layer.rows) for layer in chosen), default=0)):
            for layer in chosen:
                if step < len(layer.rows):
                    rows = layer.rows[step]
                    missing = layer.top_k - rows.choice_TK.shape[1]
                    yield rows if not missing else _wider(rows, missing)

    @property
    def token_ids_T(self) -> Tensor | None:
        """Ids of the recorded tokens, int64; None if some forward pass was given embeddings instead of ids.

        Raises:
            ConfigError: if only counts were kept.
        """
        if self.keep != "tokens" or not self._tokens:
            raise _no_tokens()
        token_T = torch.cat([tokens.token_T for tokens in self._tokens]).long()
        return None if (token_T == NOTHING).any() else token_T

    def add(self, context: RoutingContext) -> None:
        """Add the routing of one forward pass; `record` calls it for every one."""
        if not context.records:
            return
        size = next(iter(context.records.values())).index_TK.shape[0]
        context = self._placed(context, size)
        mask_T, position_T = context.mask_T, _positions(context)
        tokens = None
        if self.keep == "tokens" or self._facts.sample < 1:
            number, turn_T = self._domain_number(self._domain), self._turns(context, size)
            tokens = self._numbering.columns(context, domain=number, turn_T=turn_T)
            in_T = sampled(tokens.document_T, self._facts.sample, self._seed)
            if in_T is not None:
                tokens, mask_T = tokens[in_T], _narrowed(mask_T, in_T)
                position_T = None if position_T is None else position_T[in_T]
        if tokens is not None and self.keep == "tokens":
            self._tokens.append(tokens)
        for layer, routing in context.records.items():
            if layer not in self.layers:
                kind = self._facts.layers[layer].router if layer in self._facts.layers else ""
                self.layers[layer] = LayerTrace(
                    layer,
                    routing.num_experts,
                    routing.top_k,
                    routing.num_null,
                    kind,
                    selects=routing.assignment is None,
                    has_scores=self._facts.has_scores,
                )
            kept = tokens if self.keep == "tokens" else None
            self.layers[layer]._add(routing, mask_T, position_T, self._domain, kept)
        self.num_tokens += size if mask_T is None else int(mask_T.sum())


@overload
def record(
    model: nn.Module,
    path: None = None,
    *,
    keep: Keep = "tokens",
    sample: float = 1.0,
    seed: int = 0,
    scores: bool = False,
    tokenizer: Any = None,
) -> AbstractContextManager[RoutingTrace]: ...
@overload
def record(
    model: nn.Module,
    path: str | Path,
    *,
    keep: Keep = "tokens",
    sample: float = 1.0,
    seed: int = 0,
    scores: bool = False,
    tokenizer: Any = None,
    append: bool = False,
    rank: int = 0,
) -> AbstractContextManager[StreamedTrace]: ...
@contextlib.contextmanager
def record(
    model: nn.Module,
    path: str | Path | None = None,
    *,
    keep: Keep = "tokens",
    sample: float = 1.0,
    seed: int = 0,
    scores: bool = False,
    tokenizer: Any = None,
    append: bool = False,
    rank: int = 0,
) -> Iterator[RoutingTrace | StreamedTrace]:
    """Record the routing of everything that `model` computes inside the block.

    Works for training steps, evaluation and `generate()`; with a cache each token counts once. Padding is dropped.

        with moesaic.record(model) as trace:  # in memory
            model(input_ids)
        trace.layers[3].load_N

        with moesaic.record(model, "code.trace", sample=0.1):  # to disk, while it runs
            model(input_ids)
        moesaic.trace.TraceFile("code.trace")

    Args:
        model: a moesaic model or any stock MoE model of transformers whose router docs/router-presets.md lists, or a
            module that holds one (a PEFT model, a wrapper for data parallelism). Nothing of it changes: not its class,
            not its outputs.
        path: folder to write the trace to, in bounded memory (docs/contracts/trace.md has the format); None keeps it in
            memory.
        keep: "counts" keeps only the load of each expert, and with a capacity the drops by position: 16 bytes for each
            layer, expert and domain, and 4 kB for each layer and domain, however long the run. "tokens" also keeps every
            pick with its weight, 6 K bytes for each token and layer, and the tokens, 25 bytes for each (100,000 tokens
            through 27 layers with 6 picks take 100 MB).
        sample: share of the documents to record, each as a whole.
        seed: which documents those are.
        scores: also keep the router's scores of all experts.
        tokenizer: the one that made the ids; its fingerprint goes into the header.
        append: add to a trace that is at `path` already.
        rank: number of this process, where several write to the same `path`.

    Yields:
        A `RoutingTrace`, or with a path a `StreamedTrace`. Both have `domain(name)` and `turn(number)`, which label what
        runs inside them.

    Raises:
        UnsupportedModel: if there is no MoE layer, a router can't be read, or the model is an encoder-decoder.
        ConfigError: if an argument is not one of the choices.
        TraceError: if there is a trace at `path` and `append` is not set, or it can't be written.
    """
    if keep not in ("counts", "tokens"):
        raise ConfigError("keep", keep, "is not one of the choices", "choose 'counts' or 'tokens'")
    if path is not None and keep == "counts":
        raise ConfigError("keep", keep, "makes nothing to write", "leave it out, or leave out `path`")
    check_sample(sample)
    source = routing_source(model)
    header = facts_of(source).model_copy(
        update={
            "sample": sample,
            "has_scores": scores,
            "tokenizer": "" if tokenizer is None else tokenizer_fingerprint(tokenizer),
        }
    )
    with contextlib.ExitStack() as stack:
        if path is None:
            trace = RoutingTrace(keep, header, seed=seed)
        else:
            writer = stack.enter_context(TraceWriter(path, header, rank=rank, append=append))
            trace = StreamedTrace(writer, seed=seed)
        # A compiled model leaves its graph for it.
        add: RoutingListener = torch.compiler.disable(trace.add)  # pyright: ignore[reportAssignmentType] loses its type
        stack.callback(source.listen(add).remove)
        yield trace


def _real(values_T: Tensor, mask_T: Tensor | None) -> Tensor:
    """Without the rows of padding."""
    return values_T if mask_T is None else values_T[mask_T]


def _positions(context: RoutingContext) -> Tensor | None:
    """Place of each real token among those of its sequence, which is what fills a capacity: packed documents count on.

    A capacity and a cache of earlier tokens exclude each other, so the first token here is the first of its sequence.
    """
    if not context.records or all(routing.dropped_TK is None for routing in context.records.values()):
        return None
    tokens = next(iter(context.records.values())).index_TK.shape[0]
    real_BL = torch.ones(context.batch_size, tokens // context.batch_size, dtype=torch.bool)
    if context.mask_T is not None:
        real_BL = context.mask_T.view_as(real_BL).cpu()
    return (real_BL.cumsum(-1) - 1)[real_BL]


def _narrowed(mask_T: Tensor | None, in_T: Tensor) -> Tensor:
    """The mask without the real tokens that are not in."""
    if mask_T is None:
        return in_T
    narrowed_T = mask_T.clone()
    narrowed_T[mask_T] = in_T.to(mask_T.device)
    return narrowed_T


def _wider(rows: Rows, missing: int) -> Rows:
    """Rows with so many more columns of nothing."""
    dropped_TK = None if rows.dropped_TK is None else F.pad(rows.dropped_TK, (0, missing))
    choice_TK = F.pad(rows.choice_TK, (0, missing), value=NOTHING)
    return replace(rows, choice_TK=choice_TK, weight_TK=F.pad(rows.weight_TK, (0, missing)), dropped_TK=dropped_TK)


def _widen(chunks: list[Tensor], width: int, fill: int) -> list[Tensor]:
    """Chunks (t, k) as (t, width)."""
    return [F.pad(chunk, (0, width - chunk.shape[1]), value=fill) for chunk in chunks]


def _concatenate(chunks: list[Tensor]) -> Tensor:
    if not chunks:
        raise _no_tokens()
    return torch.cat(chunks)


def _no_tokens() -> ConfigError:
    return ConfigError(
        "keep", "counts", "keeps no single tokens", "record with keep='tokens', and run the model inside the block"
    )
