"""`StreamedTrace`: routing that goes to disk while the model runs."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.layer import RoutingContext
from moesaic.trace.header import TraceHeader
from moesaic.trace.labels import Labels
from moesaic.trace.numbering import DocumentNumbering
from moesaic.trace.rows import Rows, Snapshot
from moesaic.trace.sampling import sampled
from moesaic.trace.storage.file import TraceFile
from moesaic.trace.storage.parquet import NO_STEP
from moesaic.trace.storage.writer import TraceWriter

_DOCUMENTS_OF_A_RANK = 2**40


class StreamedTrace(Labels):
    """What `record(model, path)` yields: a trace in the making. Its rows can be read at any time.

    A forward pass waits for nothing but two earlier ones that are still being written; picks and weights are copied on
    the device, and everything else happens on the writer's thread.

    Args:
        writer: where rows go; its header says what is recorded.
        seed: which documents a sample takes.

    Attributes:
        step: optimiser step of the forward passes to come; -1 outside training.
        active: whether forward passes are recorded.
        num_tokens: tokens recorded that have reached the writer's thread.
    """

    def __init__(self, writer: TraceWriter, *, seed: int = 0) -> None:
        super().__init__()
        self.step, self.active, self.num_tokens = NO_STEP, True, 0
        self._domain_ids: tuple[tuple[str, ...], Tensor] | None = None
        self._writer, self._seed = writer, seed
        self._domains = list(writer.header.domains)
        self._numbering = DocumentNumbering(max(writer.next_document, writer.rank * _DOCUMENTS_OF_A_RANK))

    @property
    def path(self) -> Path:
        """Folder of the trace."""
        return self._writer.path

    @property
    def header(self) -> TraceHeader:
        """What was traced so far."""
        return self._writer.header

    def rows(self, layers: Collection[int] | None = None) -> Iterator[Rows]:
        """Every row so far, as `TraceFile.rows`, in which those of the other processes are too."""
        self.finish_part()
        yield from TraceFile(self.path).rows(layers)

    def finish_part(self) -> None:
        """Wait until what was recorded so far is on disk, in whole parts.

        Raises:
            TraceError: if it could not be written.
        """
        self._writer.finish_part()

    @contextlib.contextmanager
    def domain_ids(self, names: Sequence[str], domain_BS: Tensor) -> Iterator[None]:
        """The forward passes inside this block are of several domains.

        Args:
            names: of the domains.
            domain_BS: which of them every token is of, (B, S) as the ids; anything in padding.
        """
        before, self._domain_ids = self._domain_ids, (tuple(names), domain_BS)
        try:
            yield
        finally:
            self._domain_ids = before

    def add(self, context: RoutingContext) -> None:
        """Add the routing of one forward pass; `record` calls it for every one.

        Raises:
            TraceError: if something could not be written since the last call.
        """
        if not self.active or not context.records:
            return
        scores = self._writer.header.has_scores
        num_tokens = next(iter(context.records.values())).index_TK.shape[0]
        context = self._placed(context, num_tokens)
        snapshots = {
            layer: Snapshot.of(routing, scores=scores)
            for layer, routing in context.records.items()
            if routing.assignment is None
        }
        merged = frozenset(context.records.keys() - snapshots.keys())
        # Copies: who calls the model may use its buffers again before the thread comes to this.
        inputs = replace(
            context,
            records={},
            token_ids_T=_copied(context.token_ids_T),
            position_T=_copied(context.position_T),
            mask_T=_copied(context.mask_T),
            modality_T=_copied(context.modality_T),
        )
        turn_T, domain = self._turns(context, num_tokens), self._domain_of(num_tokens)
        ready = _event_of(next(iter(context.records.values())).weight_TK)

        def make() -> Iterator[Rows]:
            if ready is not None:
                ready.synchronize()
            yield from self._rows(inputs, snapshots, merged, domain, turn_T, num_tokens)

        self._writer.write_later(make, step=self.step)

    def _rows(
        self,
        inputs: RoutingContext,
        snapshots: dict[int, Snapshot],
        merged: frozenset[int],
        domain: tuple[tuple[str, ...], Tensor],
        turn_T: Tensor | None,
        num_tokens: int,
    ) -> Iterator[Rows]:
        """On the writer's thread."""
        names, which_T = domain
        number_C = torch.tensor([self._domain_number(name) for name in names], dtype=torch.int16)
        self._update_header(merged)
        tokens = self._numbering.columns(inputs, turn_T=turn_T, num_tokens=num_tokens)
        self._writer.next_document = self._numbering.next_document
        real_T = None if inputs.mask_T is None else inputs.mask_T.cpu()
        domain_T = number_C[which_T if real_T is None else which_T[real_T]]
        tokens = replace(tokens, domain_T=domain_T)
        in_T = sampled(tokens.document_T, self.header.sample, self._seed)
        kept_T = real_T
        if in_T is not None:
            tokens = tokens[in_T]
            kept_T = torch.ones(num_tokens, dtype=torch.bool) if real_T is None else real_T.clone()
            kept_T[kept_T.nonzero().squeeze(-1)[~in_T]] = False
        self.num_tokens += len(tokens)
        if len(tokens):
            for layer, snapshot in snapshots.items():
                yield snapshot.rows(layer, tokens, kept_T)

    def _domain_of(self, num_tokens: int) -> tuple[tuple[str, ...], Tensor]:
        """Names, and which of them each token of a forward pass has, padding included."""
        if self._domain_ids is None:
            return (self._domain,), torch.zeros(num_tokens, dtype=torch.int64)
        names, domain_BS = self._domain_ids
        if domain_BS.numel() != num_tokens:
            raise ConfigError(
                "domain_ids", tuple(domain_BS.shape), f"are not {num_tokens} tokens", "give one for every token"
            )
        return names, domain_BS.reshape(-1).cpu().clamp(min=0)

    def _update_header(self, merged: frozenset[int]) -> None:
        header = self._writer.header
        layers = header.layers
        if any(layers[layer].selects for layer in merged):
            layers = {
                layer: facts.model_copy(update={"selects": facts.selects and layer not in merged})
                for layer, facts in layers.items()
            }
        if layers is not header.layers or len(self._domains) != len(header.domains):
            self._writer.header = header.model_copy(update={"layers": layers, "domains": tuple(self._domains)})


def _copied(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.detach().clone()


def _event_of(values: Tensor) -> torch.Event | None:
    """When the device has computed what it was told so far; None on the CPU, which has."""
    if values.device.type == "cpu":
        return None
    event = torch.Event(values.device)
    event.record()
    return event
