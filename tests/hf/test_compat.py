"""Canaries: what moesaic relies on in transformers. When one fails, `moesaic.hf.compat` is the place to adapt."""

from __future__ import annotations

import inspect

import pytest
import torch
from tests.hf.tiny import DENSE_FAMILIES, dense_model, token_ids
from tests.parity.stock_models import stock_config, stock_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel, conversion_mapping
from transformers.integrations.moe import ExpertsInterface, use_experts_implementation
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from moesaic.hf import MoesaicConfig, MoesaicForCausalLM, compat
from moesaic.hf.checkpoint import BACKBONES
from moesaic.hf.experts import moesaic_experts_forward
from moesaic.hf.families import FAMILIES, family_of

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")


def stock(model_type: str) -> PreTrainedModel:
    return dense_model(model_type) if model_type in DENSE_FAMILIES else stock_model(model_type)


def test_the_experts_decorator_describes_a_layout_by_these_flags() -> None:
    given = set(inspect.signature(use_experts_implementation).parameters)
    known = {"experts_class", "experts_interface", "is_concatenated", "is_transposed", "has_bias", "has_gate"}
    known |= {"has_post_expert_norm"}
    assert known <= given, f"use_experts_implementation lost {known - given}; hf/experts.py and ExpertWeights read them"
    new = given - known
    assert not new, f"use_experts_implementation has new flags {new}: can kernels compute experts that set them?"


def test_the_experts_decorator_sets_flags_after_the_constructor_and_reads_the_config() -> None:
    experts = MixtralExperts(stock_config("mixtral"))
    for flag in ("has_gate", "has_bias", "is_transposed", "is_concatenated", "has_post_expert_norm"):
        assert hasattr(experts, flag), f"experts modules no longer carry {flag}; ExpertWeights.of reads it"
    assert hasattr(experts, "_apply_gate"), "experts modules no longer carry _apply_gate; ExpertWeights.of calls it"
    assert hasattr(experts, "config"), "experts modules no longer keep their config; the switch is read from there"


def test_experts_functions_skip_picks_of_no_expert_where_a_flag_says_so() -> None:
    experts = MixtralExperts(stock_config("mixtral"))
    assert experts._is_expert_parallel is False, "the flag has another name; compat.skip_no_expert sets it"
    compat.skip_no_expert(experts)
    index_TK = torch.tensor([[experts.num_experts, 1]])
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)
    x_TD, weight_TK = torch.ones(1, experts.down_proj.shape[1]), torch.ones(1, 2)
    found = []
    for name in ("eager", "grouped_mm", "batched_mm"):
        experts.config._experts_implementation = name
        found.append(experts(x_TD, index_TK, weight_TK))
    torch.testing.assert_close(found[1:], [found[0]] * 2, rtol=1e-4, atol=1e-4)


def test_a_registered_experts_function_runs_in_stock_models() -> None:
    calls = []

    def counted(module: nn.Module, hidden: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        calls.append((hidden.shape, index.shape, weight.shape))
        return moesaic_experts_forward(module, hidden, index, weight)

    model = stock_model("mixtral")
    expected = model(token_ids()).logits
    compat.register_experts_function("moesaic_canary", counted)
    try:
        model.set_experts_implementation("moesaic_canary")
        torch.testing.assert_close(model(token_ids()).logits, expected, rtol=1e-4, atol=1e-4)
    finally:
        del ExpertsInterface._global_mapping["moesaic_canary"]
    assert calls == [((24, 32), (24, 2), (24, 2))] * 2, "experts are no longer called as (hidden, index, weight)"


def test_the_experts_implementation_can_be_set_on_our_classes() -> None:
    overridden = PreTrainedModel.__dict__.get("_can_set_experts_implementation")
    assert overridden is not None, "PreTrainedModel._can_set_experts_implementation is gone; ours overrides nothing"
    assert "get_correct_experts_implementation" in PreTrainedModel.__dict__, "the default implementation hook is gone"
    assert hasattr(MoesaicConfig(), "_experts_implementation"), "configs no longer carry _experts_implementation"


@pytest.mark.parametrize("name", [*BACKBONES, "moesaic"])
def test_conversions_are_registered_under_our_names(name: str) -> None:
    mapping = conversion_mapping.get_checkpoint_conversion_mapping(name)
    assert mapping, f"no checkpoint conversion is found for {name}; see hf/checkpoint.py"


@pytest.mark.parametrize("model_type", FAMILIES)
def test_auto_classes_map_configs_to_classes(model_type: str) -> None:
    model = stock(model_type)
    base, headed = compat.backbone_class(model.config), compat.causal_lm_class(model.config)
    assert base is type(model.base_model), f"AutoModel._model_mapping gives {base} for {model_type}"
    assert headed is type(model), f"AutoModelForCausalLM._model_mapping gives {headed} for {model_type}"


@pytest.mark.parametrize("model_type", FAMILIES)
def test_layers_are_where_the_family_table_says(model_type: str) -> None:
    model, family = stock(model_type), FAMILIES[model_type]
    layers = getattr(model.base_model, family.layers)
    assert len(layers) == model.config.num_hidden_layers
    for layer in layers:
        assert isinstance(layer, GradientCheckpointingLayer), f"{type(layer).__name__} is checkpointed in another way"
        assert isinstance(getattr(layer, family.attention), nn.Module)
        assert isinstance(getattr(layer, family.feed_forward), nn.Module)
    assert hasattr(model.config, family.activation), f"{model_type} has no config field {family.activation}"
    assert family.dropout is None or hasattr(model.config, family.dropout)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_attention_receives_the_keywords_of_forward_before_the_feed_forward_runs(model_type: str) -> None:
    model, family, seen = stock(model_type), FAMILIES[model_type], []

    def attention_hook(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        seen.append(("attention", kwargs.pop("moesaic_canary", None)))
        return args, kwargs

    for layer in getattr(model.base_model, family.layers):
        getattr(layer, family.attention).register_forward_pre_hook(attention_hook, with_kwargs=True)
        getattr(layer, family.feed_forward).register_forward_pre_hook(lambda module, args: seen.append("feed_forward"))
    token = object()
    model.base_model(token_ids(), moesaic_canary=token)
    expected = [("attention", token), "feed_forward"] * model.config.num_hidden_layers
    assert seen == expected, f"{model_type}: the routing context would not reach the MoE blocks"


def test_checkpointing_calls_the_hooks_of_attention_again_in_recomputation() -> None:
    model, runs = dense_model("llama").train(), []
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for layer in model.base_model.layers:
        layer.register_forward_pre_hook(lambda module, args: runs.append("layer"))
        layer.self_attn.register_forward_pre_hook(lambda module, args: runs.append("attention"))
    model(token_ids(), labels=token_ids()).loss.backward()
    assert runs.count("layer") == 3, "GradientCheckpointingLayer no longer wraps forward, but the call with its hooks"
    assert runs.count("attention") == 6, (
        "recomputation no longer reaches attention's hooks, which hand over the context"
    )


def test_generation_finds_what_it_needs() -> None:
    assert issubclass(MoesaicForCausalLM, GenerationMixin)
    assert "forward" in MoesaicForCausalLM.__dict__
    assert "kwargs" in inspect.signature(MoesaicForCausalLM.forward).parameters, (
        "HF Trainer passes num_items_in_batch only to models whose forward takes keywords"
    )


@pytest.mark.parametrize("model_type", FAMILIES)
def test_heads_do_what_the_family_table_says(model_type: str) -> None:
    model = stock(model_type)
    hidden = model.base_model(token_ids()).last_hidden_state
    logits = family_of(model.config).finish_logits(model.get_output_embeddings()(hidden), model.config)
    torch.testing.assert_close(logits, model(token_ids()).logits, rtol=1e-5, atol=1e-5)


def test_stock_models_can_use_our_kernels_by_name() -> None:
    config = stock_config("olmoe")
    model = AutoModelForCausalLM.from_config(config, experts_implementation="moesaic").eval()
    ours = model(token_ids()).logits
    model.set_experts_implementation("eager")
    torch.testing.assert_close(ours, model(token_ids()).logits, rtol=1e-5, atol=1e-5)
