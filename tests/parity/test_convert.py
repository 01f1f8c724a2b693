"""Converted models against the stock models they come from: same numbers, and the way back loses nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tests.parity.stock_models import FAMILIES, VARIATIONS, stock_model, token_ids
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

import moesaic
from moesaic.hf.conversion import conversion_of
from moesaic.hf.families import family_of
from moesaic.layer import LoadBalancing, Routing, RoutingContext

every_family = pytest.mark.parametrize("model_type", FAMILIES)
every_case = pytest.mark.parametrize(
    ("model_type", "overrides"),
    [*((name, {}) for name in FAMILIES), *VARIATIONS],
    ids=lambda value: value if isinstance(value, str) else "-".join(f"{k}={v}" for k, v in value.items()) or "default",
)


def left_padded() -> dict[str, torch.Tensor]:
    ids = token_ids(batch=3, length=9)
    mask = torch.ones_like(ids)
    for row, padding in enumerate((0, 4, 7)):
        ids[row, :padding], mask[row, :padding] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


@every_case
def test_logits_are_the_stock_models(model_type: str, overrides: dict[str, Any]) -> None:
    stock = stock_model(model_type, **overrides)
    model = moesaic.convert(stock)
    inputs = left_padded()
    with torch.no_grad():
        theirs, ours = stock(**inputs).logits, model(**inputs).logits
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(ours[real], theirs[real], atol=1e-5, rtol=0)


@every_case
def test_gradients_are_the_stock_models(model_type: str, overrides: dict[str, Any]) -> None:
    stock = stock_model(model_type, **overrides).train()
    model = moesaic.convert(stock)
    ids = token_ids()
    stock(ids, labels=ids).loss.backward()
    model(ids, labels=ids).loss.backward()

    expected = {name: parameter.grad for name, parameter in stock.named_parameters()}
    found = gradients_under_stock_names(model)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=0, msg=lambda text, at=name: f"{at}: {text}")
    assert all(found[name].any() for name in found if "experts" in name or "router" in name)


def gradients_under_stock_names(model: moesaic.MoesaicForCausalLM) -> dict[str, torch.Tensor | None]:
    config = model.config.get_text_config()
    conversion, family = conversion_of(config), family_of(config)
    blocks = {f"{family.layers}.{index}.{family.feed_forward}": block for index, block in model.moe_blocks().items()}
    named = {
        name: parameter.grad
        for name, parameter in model.model.backbone.named_parameters()
        if not name.startswith(tuple(f"{path}." for path in blocks))
    }
    for path, block in blocks.items():
        gradients = {name: parameter.grad for name, parameter in block.named_parameters()}
        named |= {f"{path}.{name}": gradient for name, gradient in conversion.to_stock(gradients).items()}
    named = {f"model.{name}": gradient for name, gradient in named.items()}
    head = {} if config.tie_word_embeddings else {"lm_head.weight": model.lm_head.weight.grad}
    return named | head


@every_family
def test_generation_is_the_stock_models(model_type: str) -> None:
    stock = stock_model(model_type)
    model = moesaic.convert(stock)
    inputs = left_padded()
    for choice in ({}, {"num_beams": 2}):
        options = {"max_new_tokens": 6, "do_sample": False, **choice}
        assert torch.equal(model.generate(**inputs, **options), stock.generate(**inputs, **options)), choice


@every_case
def test_export_of_convert_changes_nothing(model_type: str, overrides: dict[str, Any], tmp_path: Path) -> None:
    stock = stock_model(model_type, **overrides)
    returned = moesaic.export(moesaic.convert(stock))

    assert type(returned) is type(stock)
    expected, found = stock.state_dict(), returned.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert all(found[name].is_contiguous() and found[name].dtype == expected[name].dtype for name in found)

    stock.save_pretrained(tmp_path / "stock")
    returned.save_pretrained(tmp_path / "returned")
    assert names_on_disk(tmp_path / "returned") == names_on_disk(tmp_path / "stock")
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("stock", "returned")]
    assert configs[0] | {"dtype": "float32"} == configs[1]


def names_on_disk(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


@every_family
def test_bfloat16_is_as_close_to_float32_as_the_stock_model(model_type: str) -> None:
    """Routing and combining in float32 must not cost accuracy where transformers rounds in between."""
    stock = stock_model(model_type).bfloat16()
    model = moesaic.convert(stock)
    ids = token_ids(batch=8, length=16)
    with torch.no_grad():
        theirs, ours = stock(ids).logits, model(ids).logits
        exact = stock.float()(ids).logits
    assert ours.dtype == torch.bfloat16
    assert (ours - exact).abs().mean() < 1.1 * (theirs - exact).abs().mean()


@every_family
def test_checkpoint_of_a_converted_model(model_type: str, tmp_path: Path) -> None:
    stock = stock_model(model_type)
    moesaic.convert(stock).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded, moesaic.MoesaicForCausalLM)
    ids = token_ids()
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, stock(ids).logits, atol=1e-5, rtol=0)
    returned, expected = moesaic.export(loaded).state_dict(), stock.state_dict()
    assert all(torch.equal(returned[name], tensor) for name, tensor in expected.items())


def test_masked_groups_carry_no_weight_when_scores_underflow() -> None:
    stock = stock_model("deepseek_v2", topk_group=1, num_experts_per_tok=2)
    block = stock.model.layers[1].mlp
    with torch.no_grad():
        # Experts 6 and 0 stand in different groups; the softmax of all others is exactly 0.
        block.gate.weight[:, 0] = torch.tensor([199.0, -1.0, -2.0, -3.0, -4.0, -5.0, 200.0, -6.0])
    x = torch.zeros(1, 1, 32)
    x[..., 0] = 1.0
    with torch.no_grad():
        ours = moesaic.convert(stock).moe_blocks()[1](x)
        torch.testing.assert_close(ours, block(x), atol=1e-6, rtol=0)


def pooled_loss(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**inputs, labels=inputs["input_ids"]).loss


@pytest.mark.parametrize(
    "model_type", ["mixtral", "qwen2_moe", "qwen3_moe", "mellum", "olmoe", "flex_olmo", "gpt_oss", "granitemoe"]
)
def test_balance_loss_of_one_layer_is_the_stock_models(model_type: str) -> None:
    overrides = {"mlp_layer_types": ["sparse"], "layer_types": ["full_attention"]} if model_type == "mellum" else {}
    overrides |= {"num_hidden_layers": 1, "output_router_logits": True, "router_aux_loss_coef": 0.1}
    stock = stock_model(model_type, **overrides).train()
    model = moesaic.convert(stock)
    inputs = left_padded()
    theirs, ours = pooled_loss(stock, inputs), pooled_loss(model, inputs)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    theirs.backward()
    ours.backward()
    expected = {name: parameter.grad for name, parameter in stock.named_parameters()}
    for name, gradient in gradients_under_stock_names(model).items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("layers_agree", "ratio"), [(True, 1.0), (False, 4.0)])
def test_pooled_loss_equals_ours_only_when_layers_agree(layers_agree: bool, ratio: float) -> None:
    """Four layers that each collapse onto another pair of experts are perfectly balanced when they are pooled."""
    num_layers, num_experts, top_k = 4, 8, 2
    favourites = [0 if layers_agree else 2 * layer for layer in range(num_layers)]
    logits = [torch.full((10, num_experts), -20.0) for _ in range(num_layers)]
    for logits_TN, first in zip(logits, favourites, strict=True):
        logits_TN[:, first : first + top_k] = 0.0
    pooled = load_balancing_loss_func(tuple(logits), num_experts, top_k)

    loss = LoadBalancing(coefficient=top_k / num_layers, scope="batch")
    context = RoutingContext()
    values = []
    for logits_TN in logits:
        scores_TN = logits_TN.softmax(-1)
        weight_TK, index_TK = scores_TN.topk(top_k)
        routing = Routing(index_TK, weight_TK, logits_TN, scores_TN, scores_TN)
        values.append(loss.coefficient * loss.per_sequence(routing, context))
    torch.testing.assert_close(torch.cat(values).sum(), ratio * pooled, atol=1e-5, rtol=0)
