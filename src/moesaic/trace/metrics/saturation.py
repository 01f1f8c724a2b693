"""How much of a router's final decision an earlier checkpoint has already made, on identical text."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from moesaic.errors import TraceError
from moesaic.trace.counts.neighbours import Aligned
from moesaic.trace.metrics.bootstrap import band_of, block_weights
from moesaic.trace.metrics.result import MetricResult
from moesaic.trace.rows import RoutingLog

_BLOCKS = 64


def router_saturation(
    log: RoutingLog,
    final: RoutingLog,
    *,
    layers: Collection[int] | None = None,
    exclude: Collection[int] = (),
    replicates: int = 200,
) -> dict[int, MetricResult]:
    """S = mean over tokens of |R_t and R'_t| / K, by layer (OLMoE, arXiv 2409.02060, eq. 5).

    R_t are the selections of token t in one log, R'_t those in the other, which must be of the same text. Sets of
    different size, as null experts or ragged routers make them, count |A and B| / max(|A|, |B|), and 1 when both are
    empty. The reference is chance, K / M. `values`: "corrected" = (S - K/M) / (1 - K/M), "rank_1" (the share of tokens
    with the same first choice), "rank_1_corrected" with chance 1 / M, and "tokens". 1 against itself.

    Both must number experts alike: checkpoints of one run do. For two runs see `match_experts` and `renumbered`.

    Args:
        log: the earlier checkpoint.
        final: the later one. Both are read once, side by side.
        layers: only these; None for all.
        exclude: ids to leave out.
        replicates: bootstrap draws for the band, over blocks of documents.

    Raises:
        TraceError: if the logs have different layers, experts or tokenizers, or are not of the same text.
    """
    facts = alike(log, final, layers)
    sums = {layer: np.zeros((_BLOCKS, 3)) for layer in facts}
    special = np.array(sorted(exclude), dtype=np.int64)
    for layer, document_T, token_T, other_T, choice_TK, other_TK in aligned_rows(log, final, facts):
        if not np.array_equal(token_T, other_T):
            raise TraceError(
                f"layer {layer}: the traces have different tokens; trace both checkpoints on the same text"
            )
        kept_T = ~np.isin(token_T, special)
        overlap_T, first_T = overlap(choice_TK, other_TK), choice_TK[:, 0] == other_TK[:, 0]
        block_T = document_T[kept_T] % _BLOCKS
        for column, values_T in enumerate((np.ones(len(token_T)), overlap_T, first_T)):
            sums[layer][:, column] += np.bincount(block_T, weights=values_T[kept_T], minlength=_BLOCKS)
    return {layer: _result(layer, facts[layer], torch.from_numpy(sums[layer]), replicates) for layer in facts}


def saturation_over(
    checkpoints: Mapping[int, RoutingLog], final: RoutingLog, **settings
) -> dict[int, dict[int, MetricResult]]:
    """`router_saturation` of several checkpoints, by step and layer, steps ascending.

    Args:
        checkpoints: logs by training step, all of the text of `final`.
        final: the last checkpoint.
        settings: of `router_saturation`.
    """
    return {step: router_saturation(checkpoints[step], final, **settings) for step in sorted(checkpoints)}


def overlap(choice_TK: np.ndarray, other_TK: np.ndarray) -> np.ndarray:
    """|A and B| / max(|A|, |B|) of each token's selections, float64 (T,); -1 is no selection, 1 when both have none."""
    both_T = np.zeros(len(choice_TK), dtype=np.int64)
    for column_T in choice_TK.T:
        both_T += ((column_T[:, None] == other_TK) & (column_T[:, None] >= 0)).any(1)
    most_T = np.maximum((choice_TK >= 0).sum(1), (other_TK >= 0).sum(1))
    return np.where(most_T > 0, both_T / np.maximum(most_T, 1), 1.0)


def alike(log: RoutingLog, other: RoutingLog, layers: Collection[int] | None = None) -> dict[int, tuple[int, int]]:
    """K and M of the layers of both logs.

    Raises:
        TraceError: if they do not have the same, or were made with different tokenizers.
    """
    found = [
        {
            index: (facts.num_experts, facts.num_null)
            for index, facts in sorted(header.layers.items())
            if layers is None or index in layers
        }
        for header in (log.header, other.header)
    ]
    if found[0] != found[1] or not found[0]:
        raise TraceError(
            f"the traces have other layers or experts and nulls: {found[0]} and {found[1]}; compare traces of one "
            "architecture"
        )
    tokenizers = (log.header.tokenizer, other.header.tokenizer)
    if all(tokenizers) and tokenizers[0] != tokenizers[1]:
        raise TraceError(
            f"the traces were made with different tokenizers, with the fingerprints {tokenizers[0]} and "
            f"{tokenizers[1]}; trace both with one"
        )
    return {
        index: (max(log.header.layers[index].top_k, other.header.layers[index].top_k), sum(columns))
        for index, columns in found[0].items()
    }


def aligned_rows(
    log: RoutingLog, other: RoutingLog, layers: Collection[int]
) -> Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """Layer, document, token id, the other log's token id, choices and the other's choices of the tokens in both.

    Tokens are the same where document and position are. Both logs are read side by side, in turn.

    Raises:
        TraceError: if the logs share no tokens, or one has tokens that the other lacks.
    """
    aligned = {layer: Aligned() for layer in layers}
    streams = [iter(log.rows(layers)), iter(other.rows(layers))]
    running, found = [True, True], 0
    while any(running):
        for stream in (0, 1):
            rows = next(streams[stream], None) if running[stream] else None
            if rows is None:
                running[stream] = False
                continue
            tokens = rows.tokens
            columns = (tokens.document_T, tokens.position_T, tokens.token_T, rows.choice_TK)
            pair = aligned[rows.layer].add(stream, *(column.numpy() for column in columns))
            if pair is not None:
                (document_T, _, token_T, choice_TK), (_, _, other_T, other_TK) = pair
                found += len(token_T)
                yield rows.layer, document_T, token_T, other_T, choice_TK, other_TK
    left = [sum(sides) for sides in zip(*(pairs.left for pairs in aligned.values()), strict=True)]
    if not found or any(left):
        raise TraceError(
            f"the traces are not of the same documents and positions: the second lacks {left[0]} rows of the first, "
            f"which lacks {left[1]} of the second; trace the same text in the same order"
        )


def _result(layer: int, facts: tuple[int, int], sums_B3: Tensor, replicates: int) -> MetricResult:
    top_k, columns = facts
    tokens, overlaps, firsts = sums_B3.sum(0).tolist()
    value, first, chance = overlaps / (tokens or math.nan), firsts / (tokens or math.nan), top_k / columns
    used_B3 = sums_B3[sums_B3[:, 0] > 0]
    weight_RB = block_weights(len(used_B3), replicates)
    band = None
    if weight_RB is not None:
        drawn_R3 = weight_RB @ used_B3
        band = band_of(drawn_R3[:, 1] / drawn_R3[:, 0])

    def corrected(value: float, chance: float) -> float:
        return (value - chance) / (1 - chance) if chance < 1 else math.nan

    return MetricResult(
        metric="saturation",
        layer=layer,
        value=value,
        top_k=top_k,
        num_columns=columns,
        reference=chance,
        values={
            "corrected": corrected(value, chance),
            "rank_1": first,
            "rank_1_corrected": corrected(first, 1 / columns),
            "tokens": tokens,
        },
        band=band,
        conventions={"unequal_sets": "over the larger"},
    )
