"""The block: names of its children, shared experts, dropout, parity with the stock blocks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DeepseekV2Config, DeepseekV3Config, Qwen2MoeConfig
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

from moesaic.layer import MoEBlock, MoESpec, RoutingContext, SharedExperts

N, K, D, WIDTH = 8, 3, 6, 5


def make_spec(router: dict[str, Any] | None = None, experts: dict[str, Any] | None = None, **fields: Any) -> MoESpec:
    return MoESpec.from_dict(
        {
            "experts": {"num_experts": N, "intermediate_size": WIDTH, **(experts or {})},
            "router": {"type": "top_k", "top_k": K, **(router or {})},
            **fields,
        }
    )


def make_block(spec: MoESpec, **arguments: Any) -> MoEBlock:
    torch.manual_seed(0)
    block = MoEBlock(spec, D, **arguments).double()
    for parameter in block.parameters():
        nn.init.normal_(parameter)
    return block


def make_input() -> Tensor:
    return torch.randn(2, 4, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


# --- Names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "names"),
    [
        (make_spec(), {"gate.weight", "experts.gate_up_proj", "experts.down_proj"}),
        (
            make_spec(
                router={"selection_bias": True, "linear_bias": True}, shared_experts={"sigmoid_gate": True}, dropout=0.1
            ),
            {
                "gate.weight",
                "gate.bias",
                "gate.e_score_correction_bias",
                "experts.gate_up_proj",
                "experts.down_proj",
                "shared_experts.gate_proj.weight",
                "shared_experts.up_proj.weight",
                "shared_experts.down_proj.weight",
                "shared_expert_gate.weight",
            },
        ),
        (
            make_spec(experts={"gated": False, "bias": True, "activation": "gelu"}, shared_experts={}),
            {
                "gate.weight",
                "experts.up_proj",
                "experts.up_proj_bias",
                "experts.down_proj",
                "experts.down_proj_bias",
                "shared_experts.up_proj.weight",
                "shared_experts.up_proj.bias",
                "shared_experts.down_proj.weight",
                "shared_experts.down_proj.bias",
            },
        ),
    ],
    ids=["routed only", "all parts", "without gate projections"],
)
def test_state_dict_has_the_documented_names_and_round_trips(spec: MoESpec, names: set[str]) -> None:
    block, other = make_block(spec).eval(), MoEBlock(spec, D).double().eval()
    assert set(block.state_dict()) == names
    other.load_state_dict(block.state_dict())
    assert torch.equal(other(make_input()), block(make_input()))


def test_routing_is_recorded_under_the_layer() -> None:
    block, context = make_block(make_spec(), layer=7), RoutingContext(batch_size=2)
    expected_BTD = block(make_input(), context)
    assert list(context.records) == [7]
    routing = context.records[7]
    actual_TD = block.experts(make_input().view(-1, D), routing.index_TK, routing.weight_TK)
    assert torch.equal(actual_TD.view(2, 4, D), expected_BTD)


@pytest.mark.parametrize("shape", [(D,), (3, D), (2, 3, D), (0, 3, D), (2, 1, 3, D)])
def test_any_leading_shape_is_kept(shape: tuple[int, ...]) -> None:
    assert make_block(make_spec(shared_experts={}))(torch.ones(shape, dtype=torch.float64)).shape == shape


def test_input_need_not_be_contiguous() -> None:
    block, x_BTD = make_block(make_spec(shared_experts={})), make_input()
    torch.testing.assert_close(block(x_BTD.transpose(0, 1)), block(x_BTD).transpose(0, 1))


# --- What it computes -------------------------------------------------------------------------------------------------


def test_output_is_the_weighted_sum_of_picked_experts_plus_shared() -> None:
    block = make_block(make_spec(shared_experts={"num_experts": 2, "sigmoid_gate": True}))
    assert block.shared_experts is not None
    assert block.shared_expert_gate is not None
    gate_up_NHD, down_NDF = block.experts.get_parameter("gate_up_proj"), block.experts.get_parameter("down_proj")
    actual_TD = block(make_input()).view(-1, D)
    for token, x_D in enumerate(make_input().view(-1, D)):
        scores_N = (block.gate.get_parameter("weight") @ x_D).softmax(-1)
        expected_D = torch.sigmoid(block.shared_expert_gate(x_D)) * block.shared_experts(x_D)
        for expert in scores_N.argsort(descending=True)[:K].tolist():
            gate_F, up_F = (gate_up_NHD[expert] @ x_D).chunk(2)
            expected_D = expected_D + scores_N[expert] * (down_NDF[expert] @ (nn.functional.silu(gate_F) * up_F))
        torch.testing.assert_close(actual_TD[token], expected_D, rtol=1e-11, atol=1e-11)


def test_all_experts_picked_is_a_dense_mixture() -> None:
    block, x_BTD = make_block(make_spec(router={"top_k": N})), make_input()
    x_TD = x_BTD.view(-1, D)
    scores_TN = (x_TD @ block.gate.get_parameter("weight").T).softmax(-1)
    up_TNH = torch.einsum("td,nhd->tnh", x_TD, block.experts.get_parameter("gate_up_proj"))
    gate_TNF, up_TNF = up_TNH.chunk(2, -1)
    down_NDF = block.experts.get_parameter("down_proj")
    expected_TD = torch.einsum("tn,tnf,ndf->td", scores_TN, nn.functional.silu(gate_TNF) * up_TNF, down_NDF)
    torch.testing.assert_close(block(x_BTD).view(-1, D), expected_TD, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("gated", [True, False])
def test_one_wide_shared_expert_equals_several(gated: bool) -> None:
    """DeepSeekMoE stores its shared experts as one network; the sum of the parts is the same."""
    torch.manual_seed(0)
    wide = SharedExperts(D, 3 * WIDTH, activation="silu", gated=gated, bias=False).double()
    x_TD, total_TD = torch.randn(7, D, dtype=torch.float64), torch.zeros(7, D, dtype=torch.float64)
    for part in range(3):
        rows = slice(part * WIDTH, (part + 1) * WIDTH)
        narrow = SharedExperts(D, WIDTH, activation="silu", gated=gated, bias=False).double()
        weights = {name: tensor[rows] for name, tensor in wide.state_dict().items() if "down" not in name}
        narrow.load_state_dict({**weights, "down_proj.weight": wide.down_proj.weight[:, rows]})
        total_TD += narrow(x_TD)
    torch.testing.assert_close(wide(x_TD), total_TD, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("shared", "width"),
    [({}, WIDTH), ({"num_experts": 3}, 3 * WIDTH), ({"num_experts": 2, "intermediate_size": 7}, 14)],
)
def test_shared_width(shared: dict[str, int], width: int) -> None:
    block = make_block(make_spec(shared_experts=shared))
    assert block.shared_experts is not None
    assert block.shared_experts.down_proj.in_features == width


def test_given_experts_take_the_place_of_packed_ones() -> None:
    class Doubling(nn.Module):
        def forward(self, hidden_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
            return 2 * hidden_TD

    block = MoEBlock(make_spec(), D, experts=Doubling()).double()
    assert torch.equal(block(make_input()), 2 * make_input())


def test_dropout_acts_in_training_only() -> None:
    block, plain = make_block(make_spec(dropout=0.5)), make_block(make_spec())
    expected_BTD = plain(make_input())
    assert torch.equal(block.eval()(make_input()), expected_BTD)
    torch.manual_seed(0)
    dropped_BTD = block.train()(make_input())
    kept_BTD = dropped_BTD != 0
    assert 0 < int(kept_BTD.sum()) < kept_BTD.numel()
    torch.testing.assert_close(dropped_BTD[kept_BTD], 2 * expected_BTD[kept_BTD])


def test_deep_copy_is_independent() -> None:
    block = make_block(make_spec(router={"selection_bias": True}, shared_experts={"sigmoid_gate": True}))
    expected_BTD = block(make_input())
    clone = copy.deepcopy(block)
    for parameter in block.parameters():
        parameter.data.zero_()
    assert torch.equal(clone(make_input()), expected_BTD)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_output_has_the_dtype_of_the_input(dtype: torch.dtype) -> None:
    block = make_block(make_spec(router={"selection_bias": True}, shared_experts={"sigmoid_gate": True})).to(dtype)
    assert block(make_input().to(dtype)).dtype == dtype


# --- Parity with transformers -----------------------------------------------------------------------------------------

SIZES: dict[str, Any] = {
    "hidden_size": D,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "moe_intermediate_size": WIDTH,
    "num_experts_per_tok": K,
}
DEEPSEEK: dict[str, Any] = {**SIZES, "n_routed_experts": N, "n_shared_experts": 2, "n_group": 4, "topk_group": 2}
GROUPS: dict[str, Any] = {"num_groups": 4, "top_k_groups": 2, "scaling_factor": 2.5}


def qwen2_moe(normalize: bool) -> tuple[nn.Module, MoESpec]:
    config = Qwen2MoeConfig(**SIZES, num_experts=N, shared_expert_intermediate_size=7, norm_topk_prob=normalize)
    config._experts_implementation = "eager"
    shared = {"intermediate_size": 7, "sigmoid_gate": True}
    return Qwen2MoeSparseMoeBlock(config), make_spec({"normalize_top_k": normalize}, shared_experts=shared)


def deepseek_v2(method: str) -> tuple[nn.Module, MoESpec]:
    config = DeepseekV2Config(**DEEPSEEK, topk_method=method, routed_scaling_factor=2.5)
    router = GROUPS if method == "group_limited_greedy" else {"scaling_factor": 2.5}
    return DeepseekV2Moe(config), make_spec(router, shared_experts={"num_experts": 2})


def deepseek_v3(normalize: bool) -> tuple[nn.Module, MoESpec]:
    config = DeepseekV3Config(**DEEPSEEK, norm_topk_prob=normalize, routed_scaling_factor=2.5)
    config._experts_implementation = "eager"
    router = {
        **GROUPS,
        "score_function": "sigmoid",
        "selection_bias": True,
        "normalize_top_k": normalize,
        "normalization_epsilon": 1e-20,
        "group_score": "top2_sum",
    }
    return DeepseekV3MoE(config), make_spec(router, shared_experts={"num_experts": 2})


@pytest.mark.parametrize(
    ("stock", "spec"),
    [
        qwen2_moe(False),
        qwen2_moe(True),
        deepseek_v2("greedy"),
        deepseek_v2("group_limited_greedy"),
        deepseek_v3(True),
        deepseek_v3(False),
    ],
    ids=["qwen2_moe", "qwen2_moe renormalised", "v2 greedy", "v2 groups", "v3", "v3 not renormalised"],
)
def test_parity_with_the_stock_block_forward_and_backward(stock: nn.Module, spec: MoESpec) -> None:
    torch.manual_seed(0)
    for tensor in (*stock.parameters(), *stock.buffers()):
        nn.init.normal_(tensor, std=0.5)
    block = MoEBlock(spec, D)
    stock_names = {name.replace("shared_expert.", "shared_experts."): name for name in stock.state_dict()}
    block.load_state_dict({name: stock.state_dict()[found] for name, found in stock_names.items()})
    x_BTD = make_input().float().requires_grad_()
    expected_BTD, actual_BTD = stock(x_BTD), block(x_BTD)
    torch.testing.assert_close(actual_BTD, expected_BTD, rtol=0, atol=1e-5)
    upstream_BTD = torch.randn_like(x_BTD)
    names = [name for name, _ in block.named_parameters()]
    expected = torch.autograd.grad(
        expected_BTD, [x_BTD, *(stock.get_parameter(stock_names[name]) for name in names)], upstream_BTD
    )
    actual = torch.autograd.grad(actual_BTD, [x_BTD, *(block.get_parameter(name) for name in names)], upstream_BTD)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
