"""Activations of stock experts in words, against the numbers of the modules themselves."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.parity.stock_models import stock_config
from torch import Tensor, nn
from transformers import GptOssConfig, MiniMaxM3VLTextConfig, OpenAIPrivacyFilterConfig
from transformers.activations import ACT2FN
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.minimax_m3_vl.modeling_minimax_m3_vl import MiniMaxM3VLExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts
from transformers.models.openai_privacy_filter.modeling_openai_privacy_filter import OpenAIPrivacyFilterExperts

from moesaic.layer.kernels import ExpertWeights, FusedActivation

KNOWN = ["gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "relu2", "silu", "swish"]
CLAMPED: dict[str, Any] = {
    "gpt_oss": lambda: GptOssExperts(GptOssConfig(hidden_size=8, intermediate_size=8, num_local_experts=2)),
    "openai_privacy_filter": lambda: OpenAIPrivacyFilterExperts(
        OpenAIPrivacyFilterConfig(hidden_size=8, intermediate_size=8, num_local_experts=2)
    ),
    "minimax_m3_vl": lambda: MiniMaxM3VLExperts(
        MiniMaxM3VLTextConfig(hidden_size=8, intermediate_size=8, num_local_experts=2)
    ),
}


def rows() -> Tensor:
    return torch.randn(64, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 8


def check(module: nn.Module) -> FusedActivation:
    weights = ExpertWeights.of(module)
    assert weights.fused is not None
    torch.testing.assert_close(weights.fused(rows()), weights.activate(rows()), rtol=1e-9, atol=1e-9)
    return weights.fused


@pytest.mark.parametrize("name", KNOWN)
def test_default_gate_with_a_known_activation(name: str) -> None:
    assert check(MixtralExperts(stock_config("mixtral", hidden_act=name))).gated


@pytest.mark.parametrize("name", KNOWN)
def test_experts_without_gate(name: str) -> None:
    config = SimpleNamespace(
        n_routed_experts=2, hidden_size=8, moe_intermediate_size=8, moe_latent_size=8, mlp_hidden_act=name
    )
    assert not check(NemotronHExperts(config)).gated


@pytest.mark.parametrize("family", CLAMPED)
def test_clamped_gates(family: str) -> None:
    fused = check(CLAMPED[family]())
    assert (fused.name, fused.interleaved) == ("clamped_swiglu", family == "gpt_oss")


@pytest.mark.parametrize("name", sorted(set(ACT2FN) - set(KNOWN) - {"xielu"}))
def test_other_activations_are_called_or_equal_what_they_are_taken_for(name: str) -> None:
    module = MixtralExperts(stock_config("mixtral", hidden_act=name))
    if ExpertWeights.of(module).fused is not None:
        check(module)


def test_a_gate_of_its_own_is_called() -> None:
    class Own(MixtralExperts):
        def _apply_gate(self, gate_up: Tensor) -> Tensor:
            return gate_up.chunk(2, dim=-1)[0]

    assert ExpertWeights.of(Own(stock_config("mixtral"))).fused is None
    patched = MixtralExperts(stock_config("mixtral"))
    patched._apply_gate = lambda gate_up: gate_up
    assert ExpertWeights.of(patched).fused is None


def test_a_class_of_the_same_name_elsewhere_is_called() -> None:
    class SiLU(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2

    module = MixtralExperts(stock_config("mixtral"))
    assert ExpertWeights.of(module).fused is not None
    module.act_fn = SiLU()
    assert ExpertWeights.of(module).fused is None


def test_a_subclass_keeps_the_gate_it_inherits() -> None:
    class Derived(GptOssExperts):
        pass

    fused = check(Derived(GptOssConfig(hidden_size=8, intermediate_size=8, num_local_experts=2)))
    assert fused.name == "clamped_swiglu"
