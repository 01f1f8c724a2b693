"""Merged top-k (MEO): worked numbers, the merged expert, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.layer import Experts, ExpertsConfig, LayerLoad, MergedTopKConfig, MergedTopKRouter, RoutingContext
from moesaic.layer.assignment import Merge
from moesaic.layer.kernels import ExpertWeights
from moesaic.layer.kernels.loop import run


def make_router(num_experts: int, **fields: Any) -> MergedTopKRouter:
    """A router with identity weights, in float64: its logits are the mean of its input."""
    router = MergedTopKConfig.from_dict(fields).build(num_experts, num_experts).double()
    with torch.no_grad():
        router.weight.copy_(torch.eye(num_experts))
    return router


def log(scores: list[list[float]]) -> Tensor:
    return torch.tensor(scores, dtype=torch.float64).log()


@pytest.mark.parametrize(("normalize", "weights"), [(False, [0.5, 0.3]), (True, [0.625, 0.375])])
def test_the_best_experts_of_the_mean_token_are_merged(normalize: bool, weights: list[float]) -> None:
    """Softmax of the mean .1, .5, .3, .1 (arXiv 2310.09832, section 3)."""
    x_TN = log([[0.1, 0.5, 0.3, 0.1]]) + torch.tensor([[1.0], [-1.0]]) * log([[0.4, 0.9, 0.2, 0.7]])
    routing = make_router(4, top_k=2, normalize_top_k=normalize)(x_TN)
    assert routing.index_TK.tolist() == [[1, 2], [1, 2]]
    expected = torch.tensor(weights, dtype=torch.float64)
    torch.testing.assert_close(routing.weight_TK, expected.expand(2, 2))
    assert isinstance(routing.assignment, Merge)
    torch.testing.assert_close(routing.assignment.weight_GN[0, [1, 2]], expected)
    assert not routing.assignment.weight_GN[0, [0, 3]].any()


def test_ties_go_to_the_lower_expert_and_loads_count_tokens() -> None:
    routing = make_router(4, top_k=2)(torch.zeros(6, 4, dtype=torch.float64), RoutingContext(batch_size=2))
    assert routing.index_TK.tolist() == [[0, 1]] * 6
    assert LayerLoad.of(routing).load_N.tolist() == [6, 6, 0, 0]


def test_output_is_that_of_one_expert_with_the_summed_parameters() -> None:
    """Not the sum of the experts' outputs: there is one activation."""
    torch.manual_seed(0)
    experts = Experts(ExpertsConfig(num_experts=4, intermediate_size=5, bias=True), 4).double()
    experts.reset_parameters(std=1.0)
    x_TN = torch.randn(3, 4, dtype=torch.float64)
    routing = make_router(4, top_k=2)(x_TN)
    assert routing.assignment is not None
    one, two = routing.index_TK[0].tolist()
    g, h = routing.weight_TK[0]
    weights = ExpertWeights.of(experts)
    assert weights.up_bias_NH is not None
    assert weights.down_bias_ND is not None
    up_SH = x_TN @ (g * weights.up_NHD[one] + h * weights.up_NHD[two]).T
    hidden_SF = weights.activate(up_SH + g * weights.up_bias_NH[one] + h * weights.up_bias_NH[two])
    expected_TD = hidden_SF @ (g * weights.down_NDF[one] + h * weights.down_NDF[two]).T
    expected_TD = expected_TD + g * weights.down_bias_ND[one] + h * weights.down_bias_ND[two]
    torch.testing.assert_close(routing.assignment.run(experts, x_TN), expected_TD)
    assert not torch.allclose(run(weights, x_TN, routing.index_TK, routing.weight_TK), expected_TD)


def test_bottleneck_adds_to_what_is_averaged_and_to_what_the_expert_gets() -> None:
    torch.manual_seed(0)
    experts = Experts(ExpertsConfig(num_experts=4, intermediate_size=5), 4).double()
    experts.reset_parameters(std=1.0)
    router, plain = make_router(4, top_k=2, token_bottleneck=3), make_router(4, top_k=2)
    x_TN = torch.randn(5, 4, dtype=torch.float64)

    def outcome(router: MergedTopKRouter, x_TN: Tensor) -> tuple[Tensor, Tensor]:
        routing = router(x_TN)
        assert routing.assignment is not None
        return routing.logits_TN, routing.assignment.run(experts, x_TN)

    torch.testing.assert_close(outcome(router, x_TN), outcome(plain, x_TN))  # nothing is added at first
    names = ("down_weight", "down_bias", "up_weight", "up_bias")
    down, down_bias, up, up_bias = (router.get_parameter(name) for name in names)
    for parameter in (down, down_bias, up, up_bias):
        torch.nn.init.normal_(parameter)
    expected_TN = x_TN + (x_TN @ down.T + down_bias).clamp(min=0) @ up.T + up_bias
    torch.testing.assert_close(outcome(router, x_TN), outcome(plain, expected_TN))


def test_facts() -> None:
    config = MergedTopKConfig(top_k=2)
    assert config.depends_on(training=False) == config.depends_on(training=True) == {"later_tokens"}
    assert config.unservable == "the routing of a token depends on later tokens"
    assert config.refuses_capacity == "experts are merged, so that none can be full"
    assert not config.runs_all_experts


def test_bad_configuration_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"^top_k = 9 is larger than num_experts \(8\); choose 1 to 8"):
        MergedTopKConfig(top_k=9).build(4, 8)
    with pytest.raises(ConfigError, match=r"^top_k = 0 is not valid"):
        MergedTopKConfig.from_dict({"top_k": 0})
