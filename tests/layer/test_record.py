"""The context of a forward pass: what is kept, what a layer may look up."""

from __future__ import annotations

from dataclasses import replace

import torch

from moesaic.layer import Routing, RoutingContext


def record(state: float | None = None) -> Routing:
    ones = torch.ones(2, 3)
    return Routing(
        index_TK=torch.zeros(2, 1, dtype=torch.int64),
        weight_TK=torch.ones(2, 1),
        logits_TN=ones,
        scores_TN=ones,
        selection_TN=ones,
        state=None if state is None else torch.tensor(state),
    )


def test_sizes_come_from_the_tensors() -> None:
    assert (record().num_experts, record().top_k) == (3, 1)


def test_first_record_of_a_layer_stands() -> None:
    context, first = RoutingContext(), record()
    context.commit(4, first)
    context.commit(4, replace(first, weight_TK=torch.zeros(2, 1)))
    assert context.records == {4: first}


def test_previous_state_is_that_of_the_nearest_layer_below() -> None:
    context = RoutingContext()
    assert context.previous_state(5) is None
    for layer in (7, 1, 3):
        context.commit(layer, record(state=float(layer)))
    states = {layer: context.previous_state(layer) for layer in (1, 2, 4, 7, 9)}
    assert {layer: None if state is None else state.item() for layer, state in states.items()} == {
        1: None,
        2: 1.0,
        4: 3.0,
        7: 3.0,
        9: 7.0,
    }


def test_tokens_per_sequence_counts_real_tokens() -> None:
    mask_T = torch.tensor([True, True, False, False, False, False])
    cpu = torch.device("cpu")
    assert RoutingContext(batch_size=2).tokens_per_sequence(6, dtype=torch.float64, device=cpu).tolist() == [3, 3]
    masked = RoutingContext(batch_size=2, mask_T=mask_T)
    assert masked.tokens_per_sequence(6, dtype=torch.float64, device=cpu).tolist() == [2, 0]
