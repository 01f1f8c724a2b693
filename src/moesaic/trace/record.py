"""`record(model)`: keep the routing of every forward pass that runs inside a `with` block."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesaic.errors import ConfigError, UnsupportedModel
from moesaic.hf import MoesaicModel
from moesaic.layer import LayerLoad, Routing, RoutingContext
from moesaic.trace.header import LayerFacts, TraceHeader
from moesaic.trace.numbering import DocumentNumbering
from moesaic.trace.positions import PositionCounts
from moesaic.trace.rows import NOTHING, Rows, TokenColumns, rows_of

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
            self.rows.append(rows_of(self.layer, routing, tokens, mask_T))


class RoutingTrace:
    """What `record` collected: one `LayerTrace` for each MoE layer, and the tokens that were routed.

    Attributes:
        keep: "counts" or "tokens", as given to `record`.
        layers: traces by layer index.
        num_tokens: tokens recorded, padding left out.
    """

    def __init__(self, keep: Keep, facts: TraceHeader | None = None) -> None:
        self.keep: Keep = keep
        self.layers: dict[int, LayerTrace] = {}
        self.num_tokens = 0
        self._domain = ""
        self._domains = [""]
        self._numbering = DocumentNumbering()
        self._tokens: list[TokenColumns] = []
        self._facts = facts or TraceHeader(layers={})

    @property
    def header(self) -> TraceHeader:
        """What was traced, with the layers that have run."""
        layers = {
            index: LayerFacts(
                num_experts=layer.num_experts, top_k=layer.top_k, num_null=layer.num_null, router=layer.router
            )
            for index, layer in sorted(self.layers.items())
        }
        return self._facts.model_copy(update={"layers": layers, "domains": tuple(self._domains)})

    def rows(self, layers: Collection[int] | None = None) -> Iterator[Rows]:
        """Every row once, by forward pass and layer; see `RoutingLog`.

        Raises:
            ConfigError: if only counts were kept.
        """
        if self.keep != "tokens":
            raise _no_tokens()
        chosen = [layer for index, layer in sorted(self.layers.items()) if layers is None or index in layers]
        for step in range(max((len(layer.rows) for layer in chosen), default=0)):
            for layer in chosen:
                if step < len(layer.rows):
                    rows = layer.rows[step]
                    missing = layer.top_k - rows.choice_TK.shape[1]
                    yield rows if not missing else _wider(rows, missing)

    @contextlib.contextmanager
    def domain(self, name: str) -> Iterator[None]:
        """Count the forward passes inside this block under `name`, besides the total."""
        before, self._domain = self._domain, name
        try:
            yield
        finally:
            self._domain = before

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
        mask_T = context.mask_T
        position_T = _positions(context)
        tokens = None
        if self.keep == "tokens":
            if self._domain not in self._domains:
                self._domains.append(self._domain)
            tokens = self._numbering.columns(context, domain=self._domains.index(self._domain))
            self._tokens.append(tokens)
        for layer, routing in context.records.items():
            if layer not in self.layers:
                kind = self._facts.layers[layer].router if layer in self._facts.layers else ""
                self.layers[layer] = LayerTrace(layer, routing.num_experts, routing.top_k, routing.num_null, kind)
            self.layers[layer]._add(routing, mask_T, position_T, self._domain, tokens)
        size = next(iter(context.records.values())).index_TK.shape[0]
        self.num_tokens += size if mask_T is None else int(mask_T.sum())


@contextlib.contextmanager
def record(model: nn.Module, *, keep: Keep = "tokens") -> Iterator[RoutingTrace]:
    """Record the routing of everything that `model` computes inside the block.

    Works for training steps, evaluation and `generate()`; with a cache each token counts once. Padding is dropped.

        with moesaic.record(model) as trace:
            model(input_ids)
        trace.layers[3].load_N

    Args:
        model: a moesaic model, or a module that holds one (a PEFT model, a wrapper for data parallelism).
        keep: "counts" keeps only the load of each expert, and with a capacity the drops by position: 16 bytes for each
            layer, expert and domain, and 4 kB for each layer and domain, however long the run. "tokens" also keeps every
            pick with its weight, 6 K bytes for each token and layer, and the tokens, 25 bytes for each (100,000 tokens
            through 27 layers with 6 picks take 100 MB).

    Raises:
        UnsupportedModel: if `model` holds no moesaic model, or that model has no MoE layer.
        ConfigError: if `keep` is neither choice.
    """
    if keep not in ("counts", "tokens"):
        raise ConfigError("keep", keep, "is not one of the choices", "choose 'counts' or 'tokens'")
    found = _moesaic_model(model)
    trace = RoutingTrace(keep, _facts(found))
    handle = found.add_routing_listener(trace.add)
    try:
        yield trace
    finally:
        handle.remove()


def _moesaic_model(model: nn.Module) -> MoesaicModel:
    found = next((module for module in model.modules() if isinstance(module, MoesaicModel)), None)
    if found is None:
        raise UnsupportedModel(
            f"{type(model).__name__} does not report its routing: it is not a moesaic model; "
            "turn a Mixture-of-Experts model of transformers into one with moesaic.convert(model)"
        )
    if not found.moe_blocks():
        raise UnsupportedModel(f"this {type(model).__name__} has no MoE layer, so there is no routing to record")
    return found


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


def _facts(model: MoesaicModel) -> TraceHeader:
    """What a moesaic model says of itself before it has run."""
    config = model.config.get_text_config()
    layers = {
        layer: LayerFacts(num_experts=block.gate.num_experts, top_k=block.gate.top_k, router=block.gate.config.type)
        for layer, block in model.moe_blocks().items()
    }
    name = model.config.name_or_path or type(model).__name__
    return TraceHeader(
        model=name,
        model_type=config.model_type,
        vocab_size=config.vocab_size,
        layers=layers,
        moesaic=version("moesaic"),
    )


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
