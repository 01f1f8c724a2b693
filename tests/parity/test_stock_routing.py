"""Records read from running stock blocks: what the stock router picked, with gradients to the stock router's tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.parity.stock_routers import T, dense_picks, dense_routing, read_block, read_config, tokens
from torch import Tensor, nn

from moesaic.errors import UnsupportedModel
from moesaic.hf.router_presets import ROUTER_PRESETS
from moesaic.hf.stock_routing import stock_routers
from moesaic.layer import Routing

# Blocks that are decoder layers, which need more than hidden states.
DECODER_LAYERS = {"DiffusionGemmaTextRouter", "Gemma4TextRouter"}
# Routers that look at what a block's caller alone knows, and tables without anything to balance.
NOT_READ = {"Ernie4_5_VLMoeMoeTopKRouter", "DeepseekV4HashRouter"}


class OneLayer(nn.Module):
    """A model with one block, in the place of its decoder layer 3."""

    def __init__(self, config: Any, block: nn.Module) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleDict({"3": nn.ModuleDict({"mlp": block})})


@pytest.mark.parametrize("name", [name for name in ROUTER_PRESETS if name not in NOT_READ])
def test_records_are_what_the_stock_router_did(name: str) -> None:
    preset = ROUTER_PRESETS[name]
    config = read_config(preset)
    block = read_block(preset, config)
    (router,) = stock_routers(OneLayer(config, block)).values()  # type: ignore[arg-type]
    assert router.layer == 3
    found: list[Routing] = []
    outputs: list[int] = []

    def keep_output(layer: int, y: Tensor) -> Tensor:
        outputs.append(layer)
        return y

    def keep_routing(x_TD: Tensor, output: Any) -> None:
        found.append(router.routing(x_TD, output))
        read.append(router.read(x_TD, output))

    read: list[Routing] = []
    handles = router.listen(keep_routing, keep_output)
    x_TD = tokens()
    if name in DECODER_LAYERS:
        router.gate(x_TD)
    else:
        block(x_TD.unsqueeze(0))
        assert outputs == [3]
    (routing,) = found
    for handle in handles:
        handle.remove()
    expected_TN, picked_TN = dense_picks(preset.route(block, x_TD, config), router.num_experts)
    actual_TN, actual_picked_TN = dense_routing(routing)
    assert torch.equal(actual_picked_TN, picked_TN)
    torch.testing.assert_close(actual_TN, expected_TN, rtol=0, atol=1e-6)
    assert routing.scores_TN.shape[0] == T

    (light,) = read
    assert torch.equal(light.index_TK, routing.index_TK)
    torch.testing.assert_close(light.weight_TK, routing.weight_TK.float(), rtol=0, atol=1e-6)
    torch.testing.assert_close(light.scores_TN, routing.scores_TN.float(), rtol=0, atol=1e-6)
    compared_TK, light_TK = (each.selection_TN.gather(-1, routing.index_TK) for each in (routing, light))
    clear_TKK = (compared_TK.unsqueeze(-1) - compared_TK.unsqueeze(-2)).abs() > 1e-6
    for each_TK in (compared_TK, light_TK):
        assert each_TK.isfinite().all()
    greater_TKK, light_greater_TKK = (each.unsqueeze(-1) > each.unsqueeze(-2) for each in (compared_TK, light_TK))
    assert torch.equal(greater_TKK[clear_TKK], light_greater_TKK[clear_TKK])

    routing.scores_TN.square().sum().backward()
    gate = {id(parameter) for parameter in router.gate.parameters()}
    given = [parameter for parameter in block.parameters() if parameter.grad is not None]
    assert given
    assert all(id(parameter) in gate for parameter in given)
    assert (router.selection_bias is None) == (not router.rule.has_selection_bias)


@pytest.mark.parametrize("name", sorted(NOT_READ))
def test_routers_that_cannot_be_read_are_left_out_or_refused(name: str) -> None:
    preset = ROUTER_PRESETS[name]
    config = read_config(preset)
    block = read_block(preset, config)
    with pytest.raises(UnsupportedModel, match=r"looks at modality|has no MoE layer"):
        stock_routers(OneLayer(config, block))  # type: ignore[arg-type]
