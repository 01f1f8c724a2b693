"""Segment-merged experts (Lory): worked weights, a plain reference, the stop-gradient, what depends on later tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.layer import RoutingContext, SegmentMergedConfig, SegmentMergedRouter
from moesaic.layer.assignment import Merge


def make_router(num_experts: int, length: int, **fields: Any) -> SegmentMergedRouter:
    """A router with identity weights, in float64: its logits are the mean of the segment before."""
    config = SegmentMergedConfig.from_dict({"segment_length": length, **fields})
    router = config.build(num_experts, num_experts).double()
    with torch.no_grad():
        router.weight.copy_(torch.eye(num_experts))
    return router


def test_weights_of_a_segment_come_from_the_segment_before() -> None:
    """Segments of 2 with means log (1, 3), log (4, 1) and, of one token, log (1, 1) (arXiv 2405.03133, section 3.2)."""
    x_TN = torch.tensor([[0.5, 9.0], [2.0, 1.0], [8.0, 1.0], [2.0, 1.0], [5.0, 5.0]], dtype=torch.float64).log()
    routing = make_router(2, 2)(x_TN)
    expected = [[0.25, 0.75], [0.25, 0.75], [0.25, 0.75], [0.25, 0.75], [0.8, 0.2]]
    torch.testing.assert_close(routing.weight_TK, torch.tensor(expected, dtype=torch.float64))
    assert isinstance(routing.assignment, Merge)
    assert routing.assignment.group_T.tolist() == [0, 0, 1, 1, 2]
    equal = make_router(2, 2, first_segment="equal")(x_TN)
    torch.testing.assert_close(equal.weight_TK[:2], torch.full((2, 2), 0.5, dtype=torch.float64))
    torch.testing.assert_close(equal.weight_TK[2:], routing.weight_TK[2:])


def reference(rows: list[Tensor], length: int) -> list[Tensor]:
    """Weights of each token of one sequence without padding."""
    segments = [rows[start : start + length] for start in range(0, len(rows), length)]
    weights = []
    for index, segment in enumerate(segments):
        source = segments[max(index - 1, 0)]
        weights += [(sum(source) / len(source)).softmax(-1)] * len(segment)  # type: ignore[union-attr]
    return weights


@given(st.data())
@settings(deadline=None, max_examples=100)
def test_equals_the_plain_reference_with_padding_anywhere(data: st.DataObject) -> None:
    batch, length, segment = (data.draw(st.integers(1, high)) for high in (3, 9, 4))
    mask = data.draw(
        st.lists(st.lists(st.booleans(), min_size=length, max_size=length), min_size=batch, max_size=batch)
    )
    mask_BL = torch.tensor(mask)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    x_BLN = torch.randn(batch, length, 3, dtype=torch.float64, generator=generator)
    routing = make_router(3, segment)(x_BLN.flatten(0, 1), RoutingContext(batch_size=batch, mask_T=mask_BL.flatten()))
    weight_BLN = routing.weight_TK.view(batch, length, 3)
    for row in range(batch):
        expected = reference(list(x_BLN[row][mask_BL[row]]), segment)
        for found, weight in zip(weight_BLN[row][mask_BL[row]], expected, strict=True):
            torch.testing.assert_close(found, weight)
    assert not weight_BLN[~mask_BL].any()
    assert isinstance(routing.assignment, Merge)
    none = routing.assignment.weight_GN.shape[0]
    assert ((routing.assignment.group_T == none) == ~mask_BL.flatten()).all()


def test_no_gradient_reaches_router_or_tokens_through_the_first_segment() -> None:
    router = make_router(3, 2)
    x_TN = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    weight_TK = router(x_TN).weight_TK
    assert not any(
        gradient.any()
        for gradient in torch.autograd.grad(weight_TK[:2].square().sum(), [x_TN, router.weight], retain_graph=True)
    )
    on_tokens, on_router = torch.autograd.grad(weight_TK[2:4].square().sum(), [x_TN, router.weight])
    assert on_tokens[:2].any()
    assert not on_tokens[2:].any()
    assert on_router.any()


def test_output_of_a_token_moves_with_later_ones_in_the_first_segment_only() -> None:
    x_TN = torch.randn(8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for first, moving in (("own", {1, 2, 3}), ("equal", set())):
        router = make_router(3, 4, first_segment=first)
        moved = set()
        for token in range(8):
            changed_TN = x_TN.clone()
            changed_TN[token] *= -3
            if not torch.equal(router(changed_TN).weight_TK[:token], router(x_TN).weight_TK[:token]):
                moved.add(token)
        assert moved == moving


def test_facts() -> None:
    own, equal = SegmentMergedConfig(), SegmentMergedConfig(first_segment="equal")
    for training in (False, True):
        assert own.depends_on(training) == {"later_tokens"}
        assert equal.depends_on(training) == frozenset()
    for config in (own, equal):
        assert config.unservable is not None
        assert "the segment before it, which is not in the cache" in config.unservable
        assert config.refuses_capacity is not None


def test_bad_configuration_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"^segment_length = 0 is not valid"):
        SegmentMergedConfig.from_dict({"segment_length": 0})
    with pytest.raises(ConfigError, match=r"^first_segment = 'uniform' is not one of the choices"):
        SegmentMergedConfig.from_dict({"first_segment": "uniform"})
