"""The view of expert weights that kernels compute on: stock layouts, no copies, refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.layer.kernels.cases import TOLERANCE, Call, assert_close, runs
from transformers import GptOssConfig, MixtralConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from moesaic.errors import UnsupportedKernel
from moesaic.layer.kernels import ExpertWeights, Kernel

N, D, WIDTH = 4, 8, 12


def gpt_oss_experts() -> Any:
    config = GptOssConfig(hidden_size=D, intermediate_size=WIDTH, num_local_experts=N, swiglu_limit=0.5)
    config._experts_implementation = "eager"
    return GptOssExperts(config)


def mixtral_experts() -> Any:
    config = MixtralConfig(hidden_size=D, intermediate_size=WIDTH, num_local_experts=N)
    config._experts_implementation = "eager"
    return MixtralExperts(config)


@pytest.mark.parametrize("stock", [gpt_oss_experts, mixtral_experts])
@pytest.mark.parametrize("index", [[[0, 3], [2, 1], [3, 2]], [[1, 1]] * 6], ids=["random", "skewed"])
@pytest.mark.parametrize(("kernel", "device", "dtype"), runs(torch.float64, torch.float32))
def test_stock_layouts_give_the_stock_numbers(
    kernel: Kernel, device: str, dtype: torch.dtype, stock: Callable[[], Any], index: list[list[int]]
) -> None:
    """gpt-oss stores (in, out), interleaves gate and up and has biases; Mixtral has the default layout."""
    torch.manual_seed(0)
    module = stock().to(device, dtype)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    index_TK = torch.tensor(index, device=device)
    x_TD = torch.randn(index_TK.shape[0], D, dtype=dtype, device=device, requires_grad=True)
    weight_TK = torch.rand(index_TK.shape, dtype=dtype, device=device, requires_grad=True)
    leaves = {"x": x_TD, "weight": weight_TK, **dict(module.named_parameters())}
    call = Call(leaves, ExpertWeights.of(module), x_TD, index_TK, weight_TK, torch.randn_like(x_TD))
    call.skip_unless(kernel)
    expected = call.results(kernel, lambda: module(x_TD, index_TK, weight_TK))
    assert_close(call.results(kernel), expected, 4 * TOLERANCE[dtype])


def test_view_of_stock_weights_copies_nothing() -> None:
    module = gpt_oss_experts()
    weights = ExpertWeights.of(module)
    assert weights.up_NHD.shape == (N, 2 * WIDTH, D)
    assert weights.down_NDF.shape == (N, D, WIDTH)
    assert weights.up_NHD.data_ptr() == module.gate_up_proj.data_ptr()
    assert weights.down_NDF.data_ptr() == module.down_proj.data_ptr()


def test_experts_with_a_norm_behind_them_are_refused() -> None:
    module = mixtral_experts()
    module.has_post_expert_norm = True
    with pytest.raises(UnsupportedKernel, match="norm"):
        ExpertWeights.of(module)
