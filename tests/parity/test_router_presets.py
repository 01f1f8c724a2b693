"""Every stock router class against ours as `ROUTER_PRESETS` says it: picked experts, weights and gradients."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torch
import transformers
from tests.parity.stock_routers import (
    Case,
    K,
    N,
    T,
    cases,
    context,
    dense_picks,
    dense_routing,
    read_block,
    read_config,
    tokens,
)
from torch import Tensor, nn
from transformers import AutoConfig, LlamaConfig, PreTrainedConfig

from moesaic.errors import UnsupportedModel
from moesaic.hf.router_presets import ROUTER_PRESETS, UNSUPPORTED_ROUTERS, router_preset, rule_of
from moesaic.layer import ModalityConfig, Router, Routing

MODELS = Path(transformers.__file__).parent / "models"
# Classes called routers that pick no experts for tokens, or that no model of theirs builds.
NO_ROUTERS = {
    "GraniteDoclingDensityRouter": "picks the resolution of an image",
    "Qwen3OmniMoeTextTopKRouter": "is a leftover: no model builds it",
}


def read_router(case: Case) -> tuple[PreTrainedConfig, nn.Module, Router]:
    preset = ROUTER_PRESETS[case.router]
    config = read_config(preset, **case.fields)
    block = read_block(preset, config)
    rule = rule_of(preset, config)
    num_experts = sum(rule.banks) if isinstance(rule, ModalityConfig) else N
    router = rule.build(config.hidden_size, num_experts).eval()
    router.load_state_dict(preset.weights(block.state_dict()))
    return config, block, router


def decided(routing: Routing) -> Tensor:
    """Tokens whose K-th best column is not tied with the next; a mask of 0 ties all that it hides."""
    best_TM = routing.selection_TN.sort(dim=-1, descending=True).values
    return best_TM[:, K - 1] > best_TM[:, K]


@pytest.mark.parametrize("case", cases(), ids=str)
def test_picks_weights_and_gradients_are_the_stock_routers(case: Case) -> None:
    preset = ROUTER_PRESETS[case.router]
    config, block, router = read_router(case)
    x_TD = tokens()
    routing = router(x_TD, context())
    clear_T = decided(routing)
    assert clear_T.sum() > 0.8 * T
    stock_TN, stock_picked_TN = dense_picks(preset.route(block, x_TD, config, context()), router.num_experts)
    ours_TN, picked_TN = dense_routing(routing)
    assert torch.equal(picked_TN[clear_T], stock_picked_TN[clear_T])
    torch.testing.assert_close(ours_TN[clear_T], stock_TN[clear_T], rtol=0, atol=1e-6)

    upstream_TN = torch.randn(ours_TN.shape, generator=torch.Generator().manual_seed(2)) * clear_T.unsqueeze(-1)
    (stock_TN * upstream_TN).sum().backward()
    (ours_TN * upstream_TN).sum().backward()
    given = {name: tensor.grad for name, tensor in block.named_parameters() if tensor.grad is not None}
    expected = preset.weights(given)
    found = {name: tensor.grad for name, tensor in router.named_parameters()}
    assert "weight" in found
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(
            found[name], gradient, rtol=1e-4, atol=1e-5, msg=lambda text, at=name: f"{at}: {text}"
        )


def test_a_mask_of_zero_picks_the_group_that_was_ruled_out() -> None:
    """A.X K2 with three of four groups allowed and every biased score negative: the fourth group, at 0, wins."""
    config, block, router = read_router(Case("AXK2TopkRouter", {"n_group": 4, "topk_group": 3}))
    x_TD = tokens()
    with torch.no_grad():
        block.gate.e_score_correction_bias.sub_(3.0)
        router.e_score_correction_bias.sub_(3.0)
        routing = router(x_TD)
        stock_TN, stock_picked_TN = dense_picks(ROUTER_PRESETS["AXK2TopkRouter"].route(block, x_TD, config), N)
    ours_TN, picked_TN = dense_routing(routing)
    assert (routing.selection_TN.gather(-1, routing.index_TK) == 0).all()
    assert torch.equal(picked_TN, stock_picked_TN)
    torch.testing.assert_close(ours_TN, stock_TN, rtol=0, atol=1e-6)


class WeightsOfExperts(nn.Module):
    """Stands where a block has its experts: expert i of N answers with the i-th unit vector."""

    def forward(self, hidden_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        unit_ND = torch.eye(N + 1, hidden_TD.shape[-1])
        output_TD = (unit_ND[index_TK.clamp(max=N)] * weight_TK.unsqueeze(-1)).sum(1)
        return output_TD.view(hidden_TD.shape)


# Blocks whose output is not the sum of their experts' outputs and shared ones.
OTHER_BLOCKS = {
    "AXK1TopkRouter": "norm after the experts",
    "DiffusionGemmaTextRouter": "the block is the decoder layer",
    "Ernie4_5_VLMoeMoeTopKRouter": "a block for each bank in the block",
    "Gemma4TextRouter": "the block is the decoder layer",
    "JetMoeTopKGating": "experts are two stacks of linear maps",
    "Llama4Router": "weights multiply the experts' input",
    "MuseSparkTopkRouter": "linear maps around the experts",
}


@pytest.mark.parametrize("name", [name for name in ROUTER_PRESETS if name not in OTHER_BLOCKS])
def test_weights_are_those_that_reach_the_blocks_output(name: str) -> None:
    """The whole block, with what it does to weights and outputs around the router."""
    _, block, router = read_router(Case(name, {}))
    block.experts = WeightsOfExperts()
    with torch.no_grad():
        for path, parameter in block.named_parameters():
            if "shared" in path:
                parameter.zero_()
        x_TD = tokens()
        ids = {"input_ids": context().token_ids_T} if name == "DeepseekV4HashRouter" else {}
        output = block(x_TD.unsqueeze(0), **ids)
        output_TD = (output[0] if isinstance(output, tuple) else output).view(T, -1)
        routing = router(x_TD, context())
        ours_TN, _ = dense_routing(routing)
    clear_T = decided(routing)
    torch.testing.assert_close(output_TD[clear_T, : N + 1], ours_TN[clear_T], rtol=0, atol=1e-6)


# --- Nothing is missing ---------------------------------------------------------------------------------------------


def test_at_least_sixty_classes_are_exact() -> None:
    assert len(ROUTER_PRESETS) >= 60
    assert {case.router for case in cases()} == set(ROUTER_PRESETS)
    assert all(name == preset.router == preset.router_class.__name__ for name, preset in ROUTER_PRESETS.items())


def router_classes() -> dict[str, str]:
    """Family of each class in transformers that is named as a router, or that reads how many experts there are."""
    found = {}
    for path in sorted(MODELS.glob("*/modeling_*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and re.search(r"(Router|Gating|MoEV1Gate)$", node.name):
                found[node.name] = path.parent.name
    return found


def families_with_experts() -> set[str]:
    """Families whose modelling code reads the number of experts from a config."""
    field = re.compile(r"config\.(moe_)?(num|n)_(local_|routed_)?experts\b")
    return {
        path.parent.name for path in MODELS.glob("*/modeling_*.py") if field.search(path.read_text(encoding="utf-8"))
    }


def test_every_router_of_transformers_is_known() -> None:
    unknown = {
        name: family
        for name, family in router_classes().items()
        if name not in ROUTER_PRESETS and family not in UNSUPPORTED_ROUTERS and name not in NO_ROUTERS
    }
    assert not unknown, (
        f"transformers {transformers.__version__} has routers that nothing is known about: {unknown}. Add a row to "
        "src/moesaic/hf/router_presets/table.py, or the reason why there is none to UNSUPPORTED_ROUTERS"
    )
    known = {preset.family for preset in ROUTER_PRESETS.values()} | set(UNSUPPORTED_ROUTERS)
    missing = families_with_experts() - known
    assert not missing, f"MoE families without a row in ROUTER_PRESETS or UNSUPPORTED_ROUTERS: {sorted(missing)}"
    assert known <= families_with_experts(), "families that transformers no longer has"


# --- The public function --------------------------------------------------------------------------------------------


def test_router_preset_reads_models_and_their_text_parts() -> None:
    assert router_preset(AutoConfig.for_model("qwen3_moe")).to_dict()["top_k"] == 8
    for name in ("qwen3_vl_moe", "llama4", "glm4v_moe", "aria", "qwen3_omni_moe", "step3p7"):
        config = AutoConfig.for_model(name)
        assert router_preset(config) == router_preset(config.get_text_config())


UNKNOWN: list[tuple[PreTrainedConfig, str]] = [
    (AutoConfig.for_model("mixtral", router_jitter_noise=0.1), "mixtral: router_jitter_noise = 0.1 multiplies"),
    (AutoConfig.for_model("dbrx", ffn_config={"moe_jitter_eps": 0.1}), "moe_jitter_eps = 0.1 multiplies"),
    (AutoConfig.for_model("deepseek_v2"), "deepseek_v2: num_experts_per_tok = None picks no expert; set it"),
    (AutoConfig.for_model("deepseek_v2", num_experts_per_tok=2, topk_method="noaux"), "topk_method = 'noaux' is not"),
    (AutoConfig.for_model("cohere2_moe", expert_selection_fn="relu"), "expert_selection_fn = 'relu' is not known"),
    (AutoConfig.for_model("hunyuan_v1_moe", moe_topk=[1, 2]), r"moe_topk = \[1, 2\] differs between layers"),
    (AutoConfig.for_model("gemma4"), "top_k_experts = None picks no expert"),
    (AutoConfig.for_model("inkling2", text_config={"scoring_func": "relu"}), "scoring_func = 'relu' is not a score"),
    (AutoConfig.for_model("deepseek_v4"), "deepseek_v4: layers route by different rules; say which layer"),
    (LlamaConfig(), "model_type = 'llama' is not a known MoE family; known are afmoe, "),
]


@pytest.mark.parametrize(("config", "message"), UNKNOWN, ids=lambda value: str(value)[:30])
def test_what_no_field_says_is_refused_with_the_reason(config: PreTrainedConfig, message: str) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        router_preset(config)


@pytest.mark.parametrize("family", UNSUPPORTED_ROUTERS)
def test_unsupported_families_are_refused_with_the_reason(family: str) -> None:
    with pytest.raises(UnsupportedModel, match=re.escape(UNSUPPORTED_ROUTERS[family])):
        router_preset(AutoConfig.for_model({"nllb_moe": "nllb-moe", "inkling": "inkling_mm_model"}.get(family, family)))


def test_layers_of_several_kinds() -> None:
    config = AutoConfig.for_model("deepseek_v4")
    kinds = config.mlp_layer_types
    rule = router_preset(config, layer=kinds.index("moe")).to_dict()
    assert (rule["score_function"], rule["selection_bias"], rule["scaling_factor"]) == ("sqrt_softplus", True, 1.5)
    hashed = router_preset(config, layer=kinds.index("hash_moe"))
    assert (hashed.type, hashed.table, hashed.vocabulary_size) == ("hash", "stored", config.vocab_size)
    with pytest.raises(UnsupportedModel, match="no router here does what layer 99 does"):
        router_preset(config, layer=99)


# --- The page -------------------------------------------------------------------------------------------------------


def described(name: str) -> str:
    """The fields that are not at their defaults in any case; `?` where not in all, numbers that configs give left out."""
    preset = ROUTER_PRESETS[name]
    rules = [rule_of(preset, read_config(preset, **case.fields)) for case in cases() if case.router == name]
    kind = type(rules[0])
    parts = [] if rules[0].type == "top_k" else [f"type: {rules[0].type}"]
    for field, info in kind.model_fields.items():
        values = [rule.to_dict()[field] for rule in rules]
        others = [value for index, value in enumerate(values) if value != info.default and value not in values[:index]]
        if field in ("type", "top_k") or not others:
            continue
        written = isinstance(others[0], str) or field == "normalization_epsilon"
        always = "" if info.default not in values else "?"
        parts.append(field + (f": {' or '.join(map(str, others))}" if written else "") + always)
    return ", ".join(parts) or "defaults"


def test_page_lists_every_router_and_every_reason() -> None:
    """The page's tables, written anew. If this fails, copy the rows of the message into the page."""
    page = (Path(__file__).parents[2] / "docs" / "router-presets.md").read_text(encoding="utf-8")
    exact = [
        f"| `{preset.model_type}` | `{name}` | {described(name)} | {preset.note} |".replace("|  |", "| |")
        for name, preset in sorted(ROUTER_PRESETS.items(), key=lambda item: item[1].model_type)
    ]
    missing = [f"| `{family}` | {reason} |" for family, reason in sorted(UNSUPPORTED_ROUTERS.items())]
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    assert rows == exact + missing, "\n".join(["expected rows:", *exact, "", *missing])
