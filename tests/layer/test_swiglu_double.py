"""The double gate of OpenMoE's feed-forward networks: its formula, as experts and as a dense network, and who refuses it."""

from __future__ import annotations

import pytest
import torch
from tests.layer.test_experts import WIDTH, D, N, make_experts
from torch import Tensor, nn

from moesaic.errors import ConfigError, UnsupportedKernel
from moesaic.layer import FeedForward, FeedForwardConfig, MoEBlock, MoESpec
from moesaic.layer.activations import gated, swiglu_double


def openmoe(x_TD: Tensor, wi_0: Tensor, wi_1: Tensor, wo: Tensor) -> Tensor:
    """As in the released code: wi_0 gives (a, b) for a * swish(b), which multiplies what wi_1 gives; matrices (in, out)."""
    a, b = (x_TD @ wi_0).split(wi_0.shape[1] // 2, dim=-1)
    return (a * (b * torch.sigmoid(b)) * (x_TD @ wi_1)) @ wo


def test_experts_compute_the_formula_with_four_matrices() -> None:
    experts = make_experts(activation="swiglu_double")
    assert experts.parts == 3
    assert sum(parameter.numel() for parameter in experts.parameters()) == N * 4 * D * WIDTH
    x_TD = torch.randn(5, D, dtype=torch.float64)
    weight = torch.rand(5, 2, dtype=torch.float64)
    index = torch.tensor([[0, 1], [2, 3], [1, 0], [3, N], [N, N]])
    up_NHD, down_NDF = experts.get_parameter("gate_up_proj"), experts.down_proj
    expected = torch.zeros_like(x_TD)
    for token, row in enumerate(index.tolist()):
        for pick, expert in enumerate(row):
            if expert < N:
                wi_0, wi_1 = up_NHD[expert, : 2 * WIDTH].T, up_NHD[expert, 2 * WIDTH :].T
                expected[token] += weight[token, pick] * openmoe(x_TD[token, None], wi_0, wi_1, down_NDF[expert].T)[0]
    torch.testing.assert_close(experts(x_TD, index, weight), expected, rtol=1e-12, atol=1e-12)


def test_a_first_factor_of_one_leaves_the_plain_gate() -> None:
    rows = torch.randn(4, 2 * WIDTH, dtype=torch.float64)
    double = swiglu_double(torch.cat([torch.ones(4, WIDTH, dtype=torch.float64), rows], dim=-1))
    torch.testing.assert_close(double, gated(rows, nn.functional.silu), rtol=1e-12, atol=1e-12)


def test_its_gradient() -> None:
    rows = torch.randn(3, 3 * 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(swiglu_double, (rows,))


@pytest.mark.parametrize("bias", [False, True])
def test_the_dense_network_is_one_expert(bias: bool) -> None:
    experts = make_experts(activation="swiglu_double", bias=bias, num_experts=1)
    network = FeedForwardConfig(intermediate_size=WIDTH, activation="swiglu_double", bias=bias).build(D).double()
    projections = (network.gate_linear_proj, network.gate_proj, network.up_proj)
    for kind in ("weight", *(["bias"] if bias else [])):
        suffix = "" if kind == "weight" else "_bias"
        packed = experts.get_parameter(f"gate_up_proj{suffix}")[0].chunk(3)
        for projection, part in zip(projections, packed, strict=True):
            assert projection is not None
            projection.get_parameter(kind).data.copy_(part)
        network.down_proj.get_parameter(kind).data.copy_(experts.get_parameter(f"down_proj{suffix}")[0])
    x_TD = torch.randn(5, D, dtype=torch.float64)
    whole = experts(x_TD, torch.zeros(5, 1, dtype=torch.int64), torch.ones(5, 1, dtype=torch.float64))
    torch.testing.assert_close(network(x_TD), whole, rtol=1e-12, atol=1e-12)


def test_shared_experts_have_the_gate_of_the_routed_ones() -> None:
    experts = {"num_experts": 4, "intermediate_size": 8, "activation": "swiglu_double"}
    spec = MoESpec.from_dict({"experts": experts, "router": {"top_k": 2}, "shared_experts": {"num_experts": 2}})
    block = MoEBlock(spec, D)
    assert isinstance(block.shared_experts, FeedForward)
    assert block.shared_experts.gate_linear_proj is not None
    assert sum(parameter.numel() for parameter in block.shared_experts.parameters()) == 4 * D * 16


def test_a_kernel_that_does_not_know_it_says_so() -> None:
    x_TD, index_TK, weight_TK = torch.randn(3, D), torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1)
    with pytest.raises(
        UnsupportedKernel, match=r"experts.kernel = 'native' cannot be used \(native: does not know the"
    ):
        make_experts(activation="swiglu_double", kernel="native").float()(x_TD, index_TK, weight_TK)
    make_experts(activation="swiglu_double").float()(x_TD, index_TK, weight_TK)  # "auto" takes another


def test_a_dense_network_without_gate_has_no_double_one() -> None:
    with pytest.raises(ConfigError, match=r"gated = False does not go with swiglu_double"):
        FeedForwardConfig.from_dict({"intermediate_size": 4, "activation": "swiglu_double", "gated": False})
