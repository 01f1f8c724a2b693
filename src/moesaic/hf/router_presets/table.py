"""Every stock router class as data. To add one: a row here; tests/parity checks it, and that no family is missing."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from moesaic.hf.router_presets import rules
from moesaic.hf.router_presets.base import Picks, RouterPreset
from moesaic.layer import RoutingContext


def _call_afmoe(block: Any, x_TD: Tensor, context: RoutingContext) -> Picks:
    """The router takes (B, L, D)."""
    _, weight_TK, index_TK = block.router(x_TD.unsqueeze(0), block.expert_bias)
    return Picks(index_TK, weight_TK)


def _call_dbrx(block: Any, x_TD: Tensor, context: RoutingContext) -> Picks:
    """The router returns logits; the block selects."""
    weight_TK, index_TK = block.route_tokens_to_experts(block.router(x_TD))
    return Picks(index_TK, weight_TK)


def _call_llama4(block: Any, x_TD: Tensor, context: RoutingContext) -> Picks:
    """The router returns weights of all experts, zero where not picked."""
    weight_TN, _ = block.router(x_TD)
    weight_TK, index_TK = weight_TN.topk(block.top_k, dim=-1)
    return Picks(index_TK, weight_TK)


def _call_jetmoe(block: Any, x_TD: Tensor, context: RoutingContext) -> Picks:
    """The router returns picks sorted by expert: the token and the weight of each, and how many each expert has."""
    _, token_S, weight_S, counts, _ = block.router(x_TD)
    counts_N = torch.tensor(counts, device=token_S.device)
    index_S = torch.repeat_interleave(torch.arange(len(counts), device=token_S.device), counts_N)
    order_S = token_S.argsort(stable=True)
    top_k = block.router.top_k
    return Picks(index_S[order_S].view(-1, top_k), weight_S[order_S].view(-1, top_k))


def _call_deepseek_v4_hash(block: Any, x_TD: Tensor, context: RoutingContext) -> Picks:
    """The router looks token ids up."""
    _, weight_TK, index_TK = block.gate(x_TD, context.token_ids_T)
    return Picks(index_TK, weight_TK)


def _call_ernie4_5_vl(block: Any, x_TD: Tensor, context: RoutingContext) -> Picks:
    """Each bank has its own block with its own router; experts of the second are numbered after those of the first."""
    _, text_weight_TK, text_TK = block.text_moe.gate(x_TD)
    _, vision_weight_TK, vision_TK = block.vision_moe.gate(x_TD)
    vision_T1 = context.modality_T.bool().unsqueeze(-1)  # type: ignore[union-attr]
    return Picks(
        torch.where(vision_T1, vision_TK + block.num_experts, text_TK),
        torch.where(vision_T1, vision_weight_TK, text_weight_TK),
    )


def _deepseek_v4_layers(kind: str, config: PreTrainedConfig) -> list[int]:
    return [index for index, found in enumerate(config.mlp_layer_types) if found == kind]


_normalized = partial(rules.softmax, normalize="always")
_gemma4 = {"weight": "router.proj.weight"}
_ernie = {"e_score_correction_bias": "gate.moe_statics.e_score_correction_bias"}
_banks = {
    "weight": ("text_moe.gate.weight", "vision_moe.gate.weight"),
    "e_score_correction_bias": (
        "text_moe.gate.moe_statics.e_score_correction_bias",
        "vision_moe.gate.moe_statics.e_score_correction_bias",
    ),
}

_ROWS = [
    # Softmax over all experts.
    RouterPreset("mixtral", "mixtral", "MixtralTopKRouter", "MixtralSparseMoeBlock", rules.softmax_before_jitter),
    RouterPreset("minimax", "minimax", "MiniMaxTopKRouter", "MiniMaxSparseMoeBlock", rules.softmax_before_jitter),
    RouterPreset(
        "jamba",
        "jamba",
        "JambaTopKRouter",
        "JambaSparseMoeBlock",
        partial(rules.softmax, normalize="never"),
        child="router",
    ),
    RouterPreset("olmoe", "olmoe", "OlmoeTopKRouter", "OlmoeSparseMoeBlock", rules.softmax),
    RouterPreset("flex_olmo", "flex_olmo", "FlexOlmoTopKRouter", "FlexOlmoSparseMoeBlock", rules.softmax),
    RouterPreset("mellum", "mellum", "MellumTopKRouter", "MellumSparseMoeBlock", rules.softmax),
    RouterPreset("qwen2_moe", "qwen2_moe", "Qwen2MoeTopKRouter", "Qwen2MoeSparseMoeBlock", rules.softmax),
    RouterPreset("qwen3_moe", "qwen3_moe", "Qwen3MoeTopKRouter", "Qwen3MoeSparseMoeBlock", rules.softmax),
    RouterPreset("qwen3_next", "qwen3_next", "Qwen3NextTopKRouter", "Qwen3NextSparseMoeBlock", rules.softmax),
    RouterPreset("qwen4_exp_text", "qwen4_exp", "Qwen4ExpTextTopKRouter", "Qwen4ExpTextSparseMoeBlock", rules.softmax),
    RouterPreset(
        "qwen3_omni_moe_text",
        "qwen3_omni_moe",
        "Qwen3OmniMoeThinkerTextTopKRouter",
        "Qwen3OmniMoeThinkerTextSparseMoeBlock",
        rules.softmax,
    ),
    RouterPreset(
        "qwen3_omni_moe_talker_text",
        "qwen3_omni_moe",
        "Qwen3OmniMoeTalkerTextTopKRouter",
        "Qwen3OmniMoeTalkerTextSparseMoeBlock",
        rules.softmax,
    ),
    RouterPreset("qwen3_5_moe_text", "qwen3_5_moe", "Qwen3_5MoeTopKRouter", "Qwen3_5MoeSparseMoeBlock", _normalized),
    RouterPreset(
        "qwen3_vl_moe_text", "qwen3_vl_moe", "Qwen3VLMoeTextTopKRouter", "Qwen3VLMoeTextSparseMoeBlock", _normalized
    ),
    RouterPreset(
        "hunyuan_v1_moe",
        "hunyuan_v1_moe",
        "HunYuanMoEV1Gate",
        "HunYuanMoEV1Moe",
        rules.hunyuan_v1_moe,
        {"weight": "gate.wg.weight"},
    ),
    RouterPreset(
        "gemma4_text", "gemma4", "Gemma4TextRouter", "Gemma4TextDecoderLayer", rules.gemma4, _gemma4, child="router"
    ),
    RouterPreset(
        "diffusion_gemma_text",
        "diffusion_gemma",
        "DiffusionGemmaTextRouter",
        "DiffusionGemmaDecoderTextLayer",
        rules.gemma4,
        _gemma4,
        child="router",
    ),
    RouterPreset(
        "dbrx",
        "dbrx",
        "DbrxRouter",
        "DbrxFFN",
        rules.dbrx,
        {"weight": "router.layer.weight"},
        child="router",
        call=_call_dbrx,
    ),
    # Softmax over the selected logits.
    RouterPreset(
        "granitemoe", "granitemoe", "GraniteMoeTopKRouter", "GraniteMoeMoE", rules.selected_softmax, child="router"
    ),
    RouterPreset(
        "granitemoe_swa",
        "granitemoe_swa",
        "GraniteMoeSWATopKRouter",
        "GraniteMoeSWAMoE",
        rules.selected_softmax,
        child="router",
    ),
    RouterPreset(
        "granitemoehybrid",
        "granitemoehybrid",
        "GraniteMoeHybridTopKRouter",
        "GraniteMoeHybridMoE",
        rules.selected_softmax,
        child="router",
    ),
    RouterPreset(
        "granitemoeshared",
        "granitemoeshared",
        "GraniteMoeSharedTopKRouter",
        "GraniteMoeSharedMoE",
        rules.selected_softmax,
        child="router",
    ),
    RouterPreset(
        "aria_text",
        "aria",
        "AriaTextTopKRouter",
        "AriaTextMoELayer",
        partial(rules.selected_softmax, top_k="moe_topk"),
        child="router",
    ),
    RouterPreset(
        "gpt_oss",
        "gpt_oss",
        "GptOssTopKRouter",
        "GptOssMLP",
        partial(rules.selected_softmax, linear_bias=True),
        child="router",
    ),
    RouterPreset(
        "openai_privacy_filter",
        "openai_privacy_filter",
        "OpenAIPrivacyFilterTopKRouter",
        "OpenAIPrivacyFilterMLP",
        partial(rules.selected_softmax, linear_bias=True),
        child="router",
        block_scale=lambda config: config.num_experts_per_tok,
        note="the router divides by K, the block multiplies by it",
    ),
    RouterPreset(
        "jetmoe",
        "jetmoe",
        "JetMoeTopKGating",
        "JetMoeMoE",
        rules.selected_softmax,
        {"weight": "router.layer.weight"},
        child="router",
        call=_call_jetmoe,
        note="also routes attention, in `JetMoeMoA`",
    ),
    RouterPreset("cohere2_moe", "cohere2_moe", "Cohere2MoeTopKRouter", "Cohere2MoeSparseMoeBlock", rules.cohere2_moe),
    # DeepSeek's rules and their relatives.
    RouterPreset("deepseek_v2", "deepseek_v2", "DeepseekV2TopkRouter", "DeepseekV2Moe", rules.deepseek_v2),
    RouterPreset(
        "deepseek_ocr2_text", "deepseek_ocr2", "DeepseekOcr2TextTopkRouter", "DeepseekOcr2TextMoe", rules.deepseek_v2
    ),
    RouterPreset(
        "unlimited_ocr_text", "unlimited_ocr", "UnlimitedOcrTextTopkRouter", "UnlimitedOcrTextMoe", rules.deepseek_v2
    ),
    RouterPreset("deepseek_v3", "deepseek_v3", "DeepseekV3TopkRouter", "DeepseekV3MoE", rules.deepseek_v3),
    RouterPreset("deepseek_v32", "deepseek_v32", "DeepseekV32TopkRouter", "DeepseekV32MoE", rules.deepseek_v3),
    RouterPreset("axk1", "axk1", "AXK1TopkRouter", "AXK1MoE", rules.deepseek_v3),
    RouterPreset("axk2", "axk2", "AXK2TopkRouter", "AXK2MoE", rules.axk2),
    RouterPreset("bailing_hybrid", "bailing_hybrid", "BailingHybridTopkRouter", "BailingHybridMoE", rules.deepseek_v3),
    RouterPreset("dots1", "dots1", "Dots1TopkRouter", "Dots1MoE", rules.deepseek_v3),
    RouterPreset("dots3_note_text", "dots3_note", "Dots3NoteTextTopkRouter", "Dots3NoteTextMoE", rules.deepseek_v3),
    RouterPreset("exaone_moe", "exaone_moe", "ExaoneMoeTopkRouter", "ExaoneMoeSparseMoEBlock", rules.deepseek_v3),
    RouterPreset("glm4_moe", "glm4_moe", "Glm4MoeTopkRouter", "Glm4MoeMoE", rules.deepseek_v3),
    RouterPreset("glm4_moe_lite", "glm4_moe_lite", "Glm4MoeLiteTopkRouter", "Glm4MoeLiteMoE", rules.deepseek_v3),
    RouterPreset("glm4v_moe_text", "glm4v_moe", "Glm4vMoeTextTopkRouter", "Glm4vMoeTextMoE", rules.deepseek_v3),
    RouterPreset("glm5_next_text", "glm5_next", "Glm5NextTextTopkRouter", "Glm5NextTextMoE", rules.deepseek_v3),
    RouterPreset("glm_moe_dsa", "glm_moe_dsa", "GlmMoeDsaTopkRouter", "GlmMoeDsaMoE", rules.deepseek_v3),
    RouterPreset("hy_v4", "hy_v4", "HYV4TopkRouter", "HYV4MoE", rules.deepseek_v3),
    RouterPreset("kimi_linear", "kimi_linear", "KimiLinearTopkRouter", "KimiLinearMoE", rules.deepseek_v3),
    RouterPreset("mimo_v2_flash", "mimo_v2_flash", "MiMoV2FlashTopkRouter", "MiMoV2FlashMoE", rules.deepseek_v3),
    RouterPreset("nemotron_h", "nemotron_h", "NemotronHTopkRouter", "NemotronHMoE", rules.deepseek_v3),
    RouterPreset("solar_open", "solar_open", "SolarOpenTopkRouter", "SolarOpenMoE", rules.deepseek_v3),
    RouterPreset(
        "beam",
        "beam",
        "BeamTopKRouter",
        "BeamMoE",
        rules.deepseek_v3,
        block_scale=lambda config: config.routed_scaling_factor,
    ),
    RouterPreset("mistral4", "mistral4", "Mistral4TopkRouter", "Mistral4MoE", rules.mistral4),
    RouterPreset(
        "mistral_large4_text",
        "mistral_large4",
        "MistralLarge4TextTopkRouter",
        "MistralLarge4TextMoE",
        partial(rules.mistral4, normalize="always"),
    ),
    # A selection bias and no groups.
    RouterPreset(
        "afmoe",
        "afmoe",
        "AfmoeTokenChoiceRouter",
        "AfmoeSparseMoeBlock",
        partial(rules.biased, epsilon=1e-20, scale="route_scale"),
        {"weight": "router.gate.weight"},
        child="router",
        argument="expert_bias",
        call=_call_afmoe,
    ),
    RouterPreset(
        "hy_v3",
        "hy_v3",
        "HYV3TopKRouter",
        "HYV3MoE",
        partial(rules.biased, epsilon=1e-20, scale="router_scaling_factor"),
        argument="e_score_correction_bias",
    ),
    RouterPreset(
        "dots3_note_vision_encoder",
        "dots3_note",
        "Dots3NoteVisionTopKRouter",
        "Dots3NoteVisionMoE",
        partial(rules.biased, epsilon=1e-20, scale="router_scaling_factor"),
        argument="e_score_correction_bias",
        note="the number of experts differs between layers",
    ),
    RouterPreset(
        "deepseek_v4",
        "deepseek_v4",
        "DeepseekV4TopKRouter",
        "DeepseekV4SparseMoeBlock",
        partial(rules.biased, score="scoring_func", epsilon=1e-20, scale="routed_scaling_factor"),
        layers=partial(_deepseek_v4_layers, "moe"),
    ),
    RouterPreset(
        "deepseek_v4",
        "deepseek_v4",
        "DeepseekV4HashRouter",
        "DeepseekV4SparseMoeBlock",
        rules.deepseek_v4_hash,
        call=_call_deepseek_v4_hash,
        layers=partial(_deepseek_v4_layers, "hash_moe"),
    ),
    RouterPreset(
        "inkling2_text",
        "inkling2",
        "Inkling2TopKRouter",
        "Inkling2SparseMoeBlock",
        partial(rules.biased, score="scoring_func", epsilon=1e-20, scale="routed_scaling_factor"),
    ),
    RouterPreset(
        "minimax_m2",
        "minimax_m2",
        "MiniMaxM2TopKRouter",
        "MiniMaxM2SparseMoeBlock",
        rules.minimax_m2,
        argument="e_score_correction_bias",
    ),
    RouterPreset(
        "minimax_m3_vl_text",
        "minimax_m3_vl",
        "MiniMaxM3VLTopKRouter",
        "MiniMaxM3VLSparseMoeBlock",
        partial(rules.biased, scale="routed_scaling_factor"),
        block_scale=lambda config: config.routed_scaling_factor,
    ),
    RouterPreset(
        "step3p5",
        "step3p7",
        "Step3p7TopKRouter",
        "Step3p7SparseMoeBlock",
        partial(rules.biased, scale="moe_router_scaling_factor"),
        block_scale=lambda config: config.moe_router_scaling_factor,
    ),
    RouterPreset(
        "laguna",
        "laguna",
        "LagunaTopKRouter",
        "LagunaSparseMoeBlock",
        rules.laguna,
        block_scale=lambda config: config.moe_routed_scaling_factor,
    ),
    RouterPreset("muse_spark_text", "muse_spark", "MuseSparkTopkRouter", "MuseSparkMoE", rules.muse_spark),
    RouterPreset(
        "lfm2_moe", "lfm2_moe", "Lfm2MoeTopKRouter", "Lfm2MoeSparseMoeBlock", rules.lfm2_moe, argument="expert_bias"
    ),
    RouterPreset("kolibri1", "kolibri1", "Kolibri1TopKRouter", "Kolibri1SparseMoeBlock", rules.kolibri1),
    RouterPreset(
        "ernie4_5_moe",
        "ernie4_5_moe",
        "Ernie4_5_MoeTopKRouter",
        "Ernie4_5_MoeSparseMoeBlock",
        rules.ernie4_5_moe,
        _ernie,
    ),
    RouterPreset(
        "longcat_flash",
        "longcat_flash",
        "LongcatFlashTopkRouter",
        "LongcatFlashMoE",
        rules.longcat_flash,
        {"weight": "router.classifier.weight"},
        child="router",
        note="a bias that `router_bias` asks for is made but never added",
    ),
    RouterPreset(
        "ernie4_5_vl_moe_text",
        "ernie4_5_vl_moe",
        "Ernie4_5_VLMoeMoeTopKRouter",
        "Ernie4_5_VLMoeMoeBlock",
        rules.ernie4_5_vl_moe,
        _banks,
        call=_call_ernie4_5_vl,
        note="experts of the two banks differ in width",
    ),
    # Sigmoids without a bias.
    RouterPreset("flint", "flint", "FlintTopKRouter", "FlintSparseMoeBlock", rules.sigmoid),
    RouterPreset(
        "llama4_text",
        "llama4",
        "Llama4Router",
        "Llama4TextMoe",
        rules.llama4,
        child="router",
        call=_call_llama4,
        note="the block multiplies the experts' input by the weight, not their output",
    ),
]

ROUTER_PRESETS: dict[str, RouterPreset] = {preset.router: preset for preset in _ROWS}
"""Presets by the name of the stock router class."""

UNSUPPORTED_ROUTERS: dict[str, str] = {
    "doge": "experts are found by product keys: two short lists of keys whose sums score all pairs",
    "inkling": "shared experts compete with routed ones inside the normalised weights",
    "nllb_moe": "top-2 with slots counted over the batch, and experts that take the mask of picks for indices",
    "phimoe": "sparsemixer: two experts, one after the other, each weighted among those within a distance of the best",
    "switch_transformers": "top-1 with a fixed number of slots for each expert and sequence, whatever its length",
    "vitpose_backbone": "the caller says which expert each image gets; there is no router",
    "zaya": "an MLP of three layers whose hidden state is added to that of the next layer, and an expert that does nothing",
}
"""Families of transformers, by folder, whose routing none of our fields says, with the reason."""
