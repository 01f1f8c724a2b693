"""Dense gating: worked numbers, the whole sum, evaluation with the best experts only, refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.layer import DenseConfig, DenseRouter, MoEBlock, MoESpec

N, D = 4, 3


def make_router(**fields: Any) -> DenseRouter:
    router = DenseConfig.from_dict(fields).build(N, N).double()
    with torch.no_grad():
        router.weight.copy_(torch.eye(N))
    return router


def log(*rows: list[float]) -> Tensor:
    return torch.tensor([[math.log(value) for value in row] for row in rows], dtype=torch.float64)


def test_weights_are_the_softmax_in_the_order_of_experts() -> None:
    routing = make_router()(log([0.1, 0.4, 0.2, 0.3], [0.25, 0.25, 0.25, 0.25]))
    assert routing.index_TK.tolist() == [[0, 1, 2, 3]] * 2
    expected_TN = torch.tensor([[0.1, 0.4, 0.2, 0.3], [0.25] * 4], dtype=torch.float64)
    torch.testing.assert_close(routing.weight_TK, expected_TN)


def test_block_is_the_weighted_sum_of_all_experts() -> None:
    torch.manual_seed(0)
    values = {"experts": {"num_experts": N, "intermediate_size": 5}, "router": {"type": "dense", "linear_bias": True}}
    block = MoEBlock(MoESpec.from_dict(values), D).double()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter)
    x_TD = torch.randn(7, D, dtype=torch.float64)
    assert isinstance(block.gate, DenseRouter)
    weight_TN = torch.nn.functional.linear(x_TD, block.gate.weight, block.gate.bias).softmax(-1)
    one_T1 = torch.ones(7, 1, dtype=torch.float64)
    outputs = [block.experts(x_TD, torch.full((7, 1), expert), one_T1) for expert in range(N)]
    torch.testing.assert_close(block(x_TD), sum(weight_TN[:, [i]] * output for i, output in enumerate(outputs)))


def test_gradients_are_those_of_finite_differences() -> None:
    router = make_router(score_function="softmax", linear_bias=True)
    x_TD = torch.randn(5, N, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x_TD: router(x_TD).weight_TK, x_TD)


def test_evaluation_may_run_the_best_experts_only() -> None:
    """Their weights stay what they are; ties go to the lower index."""
    x_TD = log([0.1, 0.4, 0.2, 0.3], [0.25, 0.25, 0.25, 0.25])
    router = make_router(evaluation_top_k=2)
    trained, evaluated = router.train()(x_TD), router.eval()(x_TD)
    assert trained.index_TK.tolist() == [[0, 1, 2, 3]] * 2
    assert evaluated.index_TK.tolist() == [[1, 3, N, N], [0, 1, N, N]]
    expected_TN = torch.tensor([[0.4, 0.3, 0, 0], [0.25, 0.25, 0, 0]], dtype=torch.float64)
    torch.testing.assert_close(evaluated.weight_TK, expected_TN)
    assert router.picks == 2


def test_too_many_experts_in_evaluation_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"evaluation_top_k = 5 is larger than num_experts \(4\); choose 1 to 4"):
        DenseConfig(evaluation_top_k=5).check(N)
