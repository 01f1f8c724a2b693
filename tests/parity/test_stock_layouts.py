"""`experts_implementation="moesaic"` on stock models of every layout of expert weights, with every kernel that can."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.parity.stock_models import COMMON, randomise, stock_model, token_ids
from torch import Tensor, nn
from transformers import AriaTextConfig, NemotronHConfig, OpenAIPrivacyFilterConfig, PreTrainedModel
from transformers.models.aria.modeling_aria import AriaTextForCausalLM
from transformers.models.muse_spark.configuration_muse_spark import MuseSparkTextConfig
from transformers.models.muse_spark.modeling_muse_spark import MuseSparkExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHForCausalLM
from transformers.models.openai_privacy_filter.modeling_openai_privacy_filter import (
    OpenAIPrivacyFilterForTokenClassification,
)

from moesaic.errors import UnsupportedKernel
from moesaic.hf.expert_kernels import model_kernels
from moesaic.layer.kernels import Case, ExpertWeights


def make(model_class: Any, config: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    return randomise(model_class._from_config(config, experts_implementation="eager")).eval()


def aria() -> PreTrainedModel:
    experts = {"intermediate_size": 16, "moe_num_experts": 8, "moe_topk": 2, "moe_num_shared_experts": 1}
    return make(AriaTextForCausalLM, AriaTextConfig(**COMMON, **experts))


def openai_privacy_filter() -> PreTrainedModel:
    experts = {"intermediate_size": 16, "num_local_experts": 8, "num_experts_per_tok": 2, "swiglu_limit": 0.5}
    config = OpenAIPrivacyFilterConfig(**COMMON, **experts, head_dim=16, sliding_window=6)
    return make(OpenAIPrivacyFilterForTokenClassification, config)


def nemotron_h() -> PreTrainedModel:
    sizes = {"intermediate_size": 16, "moe_intermediate_size": 16, "moe_shared_expert_intermediate_size": 16}
    common = {name: value for name, value in COMMON.items() if name != "num_hidden_layers"}
    config = NemotronHConfig(
        **common,
        **sizes,
        layers_block_type=["full_attention", "moe", "full_attention", "moe"],
        head_dim=8,
        n_routed_experts=8,
        num_experts_per_tok=2,
    )
    return make(NemotronHForCausalLM, config)


LAYOUTS: dict[str, Callable[[], PreTrainedModel]] = {
    "default": lambda: stock_model("mixtral"),
    "transposed": aria,
    "transposed_biased": openai_privacy_filter,
    "transposed_biased_interleaved": lambda: stock_model("gpt_oss"),
    "no_gate": nemotron_h,
}
KERNELS = ["auto", "loop", "grouped", "native", "triton", "grouped_mm", "batched_mm"]


def experts_of(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if hasattr(module, "_is_expert_parallel")]


def choose(model: nn.Module, name: str, monkeypatch: pytest.MonkeyPatch, *, needs_grad: bool = True) -> None:
    """Let the model run this kernel; skip with its reason if it can't."""
    experts, kernel = experts_of(model)[0], None
    x_TD = torch.ones(8, COMMON["hidden_size"], dtype=next(model.parameters()).dtype, requires_grad=needs_grad)
    with torch.set_grad_enabled(needs_grad):
        case = Case.of(
            ExpertWeights.of(experts), x_TD, torch.zeros(8, 2, dtype=torch.int64), torch.ones(8, 2), may_skip=False
        )
    for kernel in model_kernels(may_skip=False):
        if kernel.name == name and (reason := kernel.refuses(case)):
            pytest.skip(f"{name} {reason}")
    if name not in ("auto", *(kernel.name for kernel in model_kernels(may_skip=False))):
        pytest.skip(f"{name} is not registered")
    monkeypatch.setenv("MOESAIC_KERNEL", name)


def run(model: PreTrainedModel) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    logits = model(token_ids()).logits
    upstream = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2), dtype=logits.dtype)
    logits.backward(upstream)
    return logits.detach(), {
        name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
    }


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_forward_and_backward_equal_eager(layout: str, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = LAYOUTS[layout]()
    expected_logits, expected = run(model)
    model.set_experts_implementation("moesaic")
    choose(model, kernel, monkeypatch)
    logits, gradients = run(model)
    torch.testing.assert_close(logits, expected_logits, atol=1e-4, rtol=0)
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        difference = (gradients[name] - gradient).norm()
        assert difference <= 1e-5 * gradient.norm(), f"{name}: {difference} of {gradient.norm()}"


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "transposed_biased"])
def test_generate_equals_eager(layout: str, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    length, count = (3, 3) if kernel == "triton" else (None, 6)  # interpreted, a token takes it a second
    model, options = LAYOUTS[layout](), {"max_new_tokens": count, "do_sample": False, "min_new_tokens": count}
    ids = token_ids()[:, :length]
    expected = model.generate(ids, **options)
    model.set_experts_implementation("moesaic")
    choose(model, kernel, monkeypatch, needs_grad=False)
    assert torch.equal(model.generate(ids, **options), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_implementation_switches_at_run_time(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under "moesaic" our registry is asked; under other names it is not."""
    model = LAYOUTS[layout]()
    assert len(experts_of(model)) == 2
    monkeypatch.setenv("MOESAIC_KERNEL", "nobody")
    with torch.no_grad():
        for name in ("grouped_mm", "moesaic", "eager", "moesaic"):
            model.set_experts_implementation(name)
            if name == "moesaic":
                with pytest.raises(UnsupportedKernel, match="MOESAIC_KERNEL = 'nobody' cannot be used"):
                    model(token_ids())
            else:
                assert model(token_ids()).logits.isfinite().all()


def test_an_attribute_of_stock_experts_names_their_kernel() -> None:
    model = stock_model("mixtral")
    model.set_experts_implementation("moesaic")
    expected = model(token_ids()).logits
    for experts in experts_of(model):
        experts.kernel = "loop"
    torch.testing.assert_close(model(token_ids()).logits, expected, atol=1e-4, rtol=0)
    experts_of(model)[0].kernel = "sonicmoe"
    with pytest.raises(UnsupportedKernel, match=r"experts\.kernel = 'sonicmoe' cannot be used .*needs a CUDA device"):
        model(token_ids())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bfloat16_stays_as_close_to_float32_as_eager_does(layout: str) -> None:
    model = LAYOUTS[layout]()
    with torch.no_grad():
        exact = model(token_ids()).logits
        model.bfloat16()
        distances = {}
        for name in ("eager", "moesaic"):
            model.set_experts_implementation(name)
            distances[name] = (model(token_ids()).logits.float() - exact).norm().item()
    assert distances["moesaic"] <= 1.25 * distances["eager"], distances


def test_a_norm_behind_each_expert_is_refused_with_a_remedy() -> None:
    config = MuseSparkTextConfig(num_local_experts=2, moe_hidden_size=8, moe_intermediate_size=8)
    config._experts_implementation = "moesaic"
    experts = MuseSparkExperts(config)
    with pytest.raises(UnsupportedKernel, match=r"MuseSparkExperts\.has_post_expert_norm.*grouped_mm"):
        experts(torch.ones(1, 8), torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1))
