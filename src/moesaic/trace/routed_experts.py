"""The "routed experts" arrays that vLLM and SGLang return of a request, as traces, and traces as such arrays.

Both servers return, where asked to (`--enable-return-routed-experts`), which experts each layer's router selected for each
token of a request; docs/replay.md has their formats. Such an array is (tokens, layers, K), and has no weights, no token ids
and no record of drops.
"""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moesaic.errors import TraceError
from moesaic.trace.header import LayerFacts, TraceHeader
from moesaic.trace.rows import NOTHING, RoutingLog, Rows, TokenColumns

_NPY = b"\x93NUMPY"


@dataclass(frozen=True)
class ImportedTrace:
    """A trace in memory that was made elsewhere: a `RoutingLog`.

    Attributes:
        header: what was traced.
        batches: its rows.
    """

    header: TraceHeader
    batches: Sequence[Rows]

    def rows(self, layers: Collection[int] | None = None) -> Iterator[Rows]:
        """Every row once; see `RoutingLog`."""
        for rows in self.batches:
            if layers is None or rows.layer in layers:
                yield rows


def to_routed_experts(log: RoutingLog, document: int, *, num_layers: int | None = None) -> np.ndarray:
    """The picks of one document as vLLM and SGLang return them.

    Args:
        log: the trace.
        document: number of the document.
        num_layers: number of all decoder layers of the model: the array then has a place for each, where layers without
            experts hold zeros, as both servers have it. None for MoE layers only, lowest first.

    Returns:
        int32 (tokens, layers, K), in the order of positions. K is that of the layer with most picks; -1 fills up tokens and
        layers with fewer. Null experts keep their numbers, from N on.

    Raises:
        TraceError: if the trace does not hold the document, or holds dropped picks, which such an array can't mark.
    """
    facts = log.header.layers
    if num_layers is not None and num_layers <= max(facts, default=-1):
        raise TraceError(
            f"num_layers = {num_layers} leaves no place for MoE layer {max(facts)}; give all decoder layers"
        )
    found: dict[int, list[tuple[Tensor, Tensor]]] = {}
    for rows in log.rows():
        rows = rows[rows.tokens.document_T == document]
        if rows.dropped_TK is not None and rows.dropped_TK.any():
            raise TraceError(
                f"document {document}, layer {rows.layer}: some of its picks were dropped by a capacity, which an array of "
                "routed experts can't say; keep the trace itself, or record without a capacity"
            )
        if len(rows):
            found.setdefault(rows.layer, []).append((rows.tokens.position_T, rows.choice_TK))
    if not found:
        raise TraceError(f"the trace holds no document {document}; documents are numbered from 0 as they were recorded")
    length = max(sum(len(position_T) for position_T, _ in parts) for parts in found.values())
    width = max(choice_TK.shape[1] for parts in found.values() for _, choice_TK in parts)
    array = np.full((length, len(facts) if num_layers is None else num_layers, width), NOTHING, dtype=np.int32)
    if num_layers is not None:
        array[:, [layer for layer in range(num_layers) if layer not in facts]] = 0
    for place, layer in enumerate(sorted(facts)):
        order = np.concatenate([position_T.numpy() for position_T, _ in found.get(layer, [])]).argsort(kind="stable")
        choice = np.full((length, width), NOTHING, dtype=np.int32)
        start = 0
        for _, choice_TK in found[layer]:
            choice[start : start + len(choice_TK), : choice_TK.shape[1]] = choice_TK.numpy()
            start += len(choice_TK)
        array[:, layer if num_layers is not None else place] = choice[order]
    return array


def encode_routed_experts(array: np.ndarray) -> str:
    """The text in which SGLang's server sends such an array: the base64 form of its int32 numbers in a row."""
    return base64.b64encode(np.ascontiguousarray(array, dtype=np.int32).tobytes()).decode("ascii")


def from_routed_experts(
    arrays: Sequence[Any],
    token_ids: Sequence[Sequence[int] | Tensor | np.ndarray],
    *,
    header: TraceHeader,
    starts: Sequence[int] | None = None,
) -> ImportedTrace:
    """A trace of what vLLM or SGLang returned, to be replayed or reported on.

    Weights are not known: they are NaN in the trace, so that it is replayed with weights="router", and what a metric makes of
    weights is NaN. Tokens whose picks are -1 in all layers, which some versions send of prompts that they found in a cache,
    are left out.

    Args:
        arrays: for each document, its routed experts (tokens, layers, K): an array, a tensor, nested lists, or what a server
            sends: the base64 form of an .npy file (vLLM) or of int32 numbers in a row (SGLang). A prompt's and its
            completion's that come separately are to be concatenated. Layers are all decoder layers, or the MoE layers only.
        token_ids: for each document, the ids of its tokens. The last one may have no picks: it was sampled and did not pass
            the model.
        header: what was run, as `moesaic.trace.facts_of(model)` says of a model here, which need not be the one that runs.
        starts: for each document, the position of the first token of its array and ids; None for 0.

    Raises:
        TraceError: if numbers of arrays, tokens, layers or picks don't fit, or an expert does not exist.
    """
    if len(arrays) != len(token_ids):
        raise TraceError(f"there are {len(arrays)} arrays of routed experts, and {len(token_ids)} lists of token ids")
    if starts is not None and len(starts) != len(arrays):
        raise TraceError(f"there are {len(arrays)} arrays of routed experts, and {len(starts)} starts")
    batches: list[Rows] = []
    for document, (given, ids) in enumerate(zip(arrays, token_ids, strict=True)):
        array = _array(given, len(ids), header, document)
        held = (array != NOTHING).any(axis=(1, 2))
        start = 0 if starts is None else starts[document]
        tokens = _tokens(document, start, np.asarray(ids, dtype=np.int64), held)
        for place, (layer, facts) in enumerate(sorted(header.layers.items())):
            at = place if array.shape[1] == len(header.layers) else layer
            choice_TK = torch.from_numpy(np.ascontiguousarray(array[held, at, : facts.top_k]))
            _check_experts(choice_TK, layer, facts, document)
            weight_TK = torch.full(choice_TK.shape, torch.nan).masked_fill(choice_TK == NOTHING, 0.0)
            batches.append(Rows(layer, tokens, choice_TK, weight_TK))
    return ImportedTrace(header, batches)


def _array(given: Any, num_ids: int, header: TraceHeader, document: int) -> np.ndarray:
    """int32 (tokens, layers, K), with shapes checked."""
    layers, width = header.layers, max(facts.top_k for facts in header.layers.values())
    array = _decoded(given, num_ids, document) if isinstance(given, str | bytes) else np.asarray(given)
    if array.ndim == 1 and isinstance(given, str | bytes):
        array = _shaped(array, num_ids, header, document)
    where = f"document {document}: routed experts of shape {tuple(array.shape)}"
    if array.ndim != 3 or not np.issubdtype(array.dtype, np.integer):
        raise TraceError(f"{where} and type {array.dtype} are not whole numbers of shape (tokens, layers, picks)")
    if array.shape[0] not in (num_ids, num_ids - 1):
        raise TraceError(
            f"{where} are of {array.shape[0]} tokens, and there are {num_ids} token ids; give the ids of prompt and completion, "
            "of which the last may have no picks, and concatenate the two where their picks come separately"
        )
    if array.shape[1] != len(layers) and array.shape[1] <= max(layers):
        raise TraceError(
            f"{where} are of {array.shape[1]} layers, and the model has {len(layers)} MoE layers, the last of them layer "
            f"{max(layers)}; give those of all decoder layers, or of the MoE layers only"
        )
    if array.shape[2] != width:
        raise TraceError(f"{where} have {array.shape[2]} picks for each token, and the model makes {width}")
    return array.astype(np.int32)


def _decoded(given: str | bytes, num_ids: int, document: int) -> np.ndarray:
    """What a server has sent."""
    try:
        data = base64.b64decode(given, validate=True)
        if data.startswith(_NPY):
            return np.load(io.BytesIO(data), allow_pickle=False)
        return np.frombuffer(data, dtype="<i4")
    except (binascii.Error, ValueError) as error:
        raise TraceError(
            f"document {document}: its routed experts are neither the base64 form of an .npy file nor of int32 numbers ({error})"
        ) from None


def _shaped(array: np.ndarray, num_ids: int, header: TraceHeader, document: int) -> np.ndarray:
    """Numbers in a row as (tokens, layers, K), whichever number of layers makes the number of tokens right."""
    width = max(facts.top_k for facts in header.layers.values())
    for tokens in (num_ids - 1, num_ids):
        layers, rest = divmod(array.size, max(tokens, 1) * width)
        if tokens and not rest and (layers == len(header.layers) or layers > max(header.layers)):
            return array.reshape(tokens, layers, width)
    raise TraceError(
        f"document {document}: {array.size} numbers are no whole number of layers for {num_ids} tokens, the last of which may "
        f"be left out, with {width} picks each; give the ids of exactly the tokens that were asked for"
    )


def _tokens(document: int, start: int, ids: np.ndarray, held: np.ndarray) -> TokenColumns:
    """Columns of the tokens that have picks."""
    kept_T = torch.from_numpy(held)
    count = len(held)
    position_T = start + torch.arange(count, dtype=torch.int32)
    return TokenColumns(
        document_T=torch.full((count,), document, dtype=torch.int64),
        position_T=position_T,
        place_T=position_T,
        token_T=torch.from_numpy(ids[:count]).to(torch.int32),
        domain_T=torch.zeros(count, dtype=torch.int16),
        turn_T=torch.full((count,), NOTHING, dtype=torch.int16),
        modality_T=torch.full((count,), NOTHING, dtype=torch.int8),
    )[kept_T]


def _check_experts(choice_TK: Tensor, layer: int, facts: LayerFacts, document: int) -> None:
    bad_TK = (choice_TK < NOTHING) | (choice_TK >= facts.num_columns)
    if bad_TK.any():
        raise TraceError(
            f"document {document}, layer {layer}: expert {int(choice_TK[bad_TK][0])} is not one of the {facts.num_columns} "
            "of the model; a server with redundant experts may number copies, which its own table maps back"
        )
