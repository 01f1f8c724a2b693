"""How the router fields of stock configs read as fields of our router configs, one function a rule."""

from __future__ import annotations

from typing import Any, Literal

from transformers import PreTrainedConfig

from moesaic.hf.router_presets.base import unsupported

Normalize = Literal["always", "never", "norm_topk_prob"]
# Names of score functions in configs.
SCORE_FUNCTIONS = {"sigmoid": "sigmoid", "sqrtsoftplus": "sqrt_softplus"}
JITTER = "multiplies the block's input by random noise in training, which experts see too; a router here can't do that"


def softmax(
    config: PreTrainedConfig, *, top_k: str = "num_experts_per_tok", normalize: Normalize = "norm_topk_prob"
) -> dict[str, Any]:
    """Softmax over all experts, top-k, weights that sum to 1 or not (Mixtral, arXiv 2401.04088, section 2.1)."""
    return {"top_k": _top_k(config, top_k), "normalize_top_k": _normalize(config, normalize)}


def softmax_before_jitter(config: PreTrainedConfig) -> dict[str, Any]:
    """`softmax` with weights that sum to 1, for blocks that multiply their input by noise in training."""
    refuse_jitter(config)
    return softmax(config, normalize="always")


def selected_softmax(
    config: PreTrainedConfig, *, top_k: str = "num_experts_per_tok", linear_bias: bool = False
) -> dict[str, Any]:
    """Top-k over logits, then softmax over the selected ones."""
    return {
        "top_k": _top_k(config, top_k),
        "softmax_over": "selected",
        **({"linear_bias": True} if linear_bias else {}),
    }


def sigmoid(config: PreTrainedConfig) -> dict[str, Any]:
    """Sigmoid scores without a selection bias."""
    return softmax(config) | {"score_function": "sigmoid"}


def biased(
    config: PreTrainedConfig,
    *,
    score: str | None = None,
    normalize: Normalize = "always",
    epsilon: float = 0.0,
    scale: str | None = None,
) -> dict[str, Any]:
    """Scores, a bias for selection only, renormalised weights, a scale (arXiv 2412.19437, section 2.1.2, no groups).

    Args:
        score: config field that names the score function; None for sigmoid.
        scale: config field of the scale; None for none.
    """
    rule = {
        "top_k": _top_k(config),
        "score_function": "sigmoid" if score is None else _score_function(config, score),
        **_normalization(config, normalize, epsilon),
        "selection_bias": True,
    }
    return rule if scale is None else rule | {"scaling_factor": getattr(config, scale)}


def deepseek_v2(config: PreTrainedConfig) -> dict[str, Any]:
    """Softmax, scaled weights that are never renormalised, groups by their best expert (arXiv 2405.04434, section 2.2).

    The stock router ignores `norm_topk_prob`. It sets masked scores to 0 and takes the masked score as weight, so a
    masked expert adds nothing even when it is picked among scores that underflowed to 0. Masking with -inf gives the
    same output in that case too; masking with 0 would not, as our weights are the unmasked scores.
    """
    rule = {"top_k": _top_k(config), "scaling_factor": config.routed_scaling_factor}
    match config.topk_method:
        case "greedy":
            return rule
        case "group_limited_greedy":
            return rule | groups(config, "max")
    raise unsupported(config, "topk_method", "is not known", "use greedy or group_limited_greedy")


def deepseek_v3(config: PreTrainedConfig) -> dict[str, Any]:
    """Sigmoid, selection bias, groups by their two best (arXiv 2412.19437, section 2.1.2)."""
    rule = biased(config, normalize="norm_topk_prob", epsilon=1e-20, scale="routed_scaling_factor")
    return rule | groups(config, "top2_sum")


def axk2(config: PreTrainedConfig) -> dict[str, Any]:
    """`deepseek_v3` whose groups are optional and masked with 0, so a masked expert beats a negative biased score."""
    if config.n_group is None:
        return biased(config, normalize="norm_topk_prob", epsilon=1e-20, scale="routed_scaling_factor")
    return _masked_with_zero(deepseek_v3(config))


def mistral4(config: PreTrainedConfig, *, normalize: Normalize = "norm_topk_prob") -> dict[str, Any]:
    """Softmax, groups by their two best, masked with 0."""
    rule = {
        "top_k": _top_k(config),
        **_normalization(config, normalize, 1e-20),
        "scaling_factor": config.routed_scaling_factor,
    }
    return _masked_with_zero(rule | groups(config, "top2_sum"))


def minimax_m2(config: PreTrainedConfig) -> dict[str, Any]:
    """`biased` for a block that multiplies its input by noise in training."""
    refuse_jitter(config)
    return biased(config)


def cohere2_moe(config: PreTrainedConfig) -> dict[str, Any]:
    """Top-k over logits, then softmax over the selected ones, or their sigmoids, renormalised or not."""
    match config.expert_selection_fn:
        case "softmax":
            return selected_softmax(config)
        case "sigmoid":
            return sigmoid(config) | {"select_by": "logits"}
    raise unsupported(config, "expert_selection_fn", "is not known", "use softmax or sigmoid")


def dbrx(config: PreTrainedConfig) -> dict[str, Any]:
    """Softmax, weights divided by their L_p norm. The block reads `ffn_config`."""
    ffn = config.ffn_config
    if ffn.moe_jitter_eps is not None:
        raise unsupported(ffn, "moe_jitter_eps", JITTER, "set it to None, which leaves inference as it is")
    rule: dict[str, Any] = {"top_k": _top_k(ffn, "moe_top_k")}
    order = ffn.moe_normalize_expert_weights
    return rule if order is None else rule | {"normalize_top_k": True, "normalization_order": order}


def ernie4_5_moe(config: PreTrainedConfig) -> dict[str, Any]:
    """Softmax, selection bias, weights divided by their sum or a floor."""
    return {
        "top_k": _top_k(config),
        "selection_bias": True,
        "normalize_top_k": True,
        "normalization_floor": config.moe_norm_min,
    }


def deepseek_v4_hash(config: PreTrainedConfig) -> dict[str, Any]:
    """Experts from a table of token ids, with learned weights that sum to the scale."""
    rule = biased(config, score="scoring_func", epsilon=1e-20, scale="routed_scaling_factor")
    del rule["selection_bias"]
    return rule | {"type": "hash", "table": "stored", "weights": "scores", "vocabulary_size": config.vocab_size}


def ernie4_5_vl_moe(config: PreTrainedConfig) -> dict[str, Any]:
    """`ernie4_5_moe` in each of two banks with as many experts: one for text, one for images."""
    return ernie4_5_moe(config) | {"type": "modality", "banks": (config.moe_num_experts, config.moe_num_experts)}


def gemma4(config: PreTrainedConfig) -> dict[str, Any]:
    """Input divided by its root mean square and scaled, softmax, weights times a learned factor of the expert."""
    return {
        "top_k": _top_k(config, "top_k_experts"),
        "normalize_top_k": True,
        "expert_scale": True,
        "input_norm": True,
        "input_norm_epsilon": config.rms_norm_eps,
        "input_scale": True,
        "logit_scale": config.hidden_size**-0.5,
    }


def hunyuan_v1_moe(config: PreTrainedConfig) -> dict[str, Any]:
    """`softmax` with weights that sum to 1, where K may be a list with one entry for each layer."""
    if isinstance(config.moe_topk, int):
        return softmax(config, top_k="moe_topk", normalize="always")
    raise unsupported(config, "moe_topk", "differs between layers", "a spec has one router; give a single number")


def kolibri1(config: PreTrainedConfig) -> dict[str, Any]:
    """The bias is added to logits, the weights are sigmoids of unbiased ones."""
    return sigmoid(config) | {"selection_bias": True, "select_by": "logits"}


def laguna(config: PreTrainedConfig) -> dict[str, Any]:
    """`biased` with bounded logits."""
    rule = biased(config, scale="moe_routed_scaling_factor")
    bound = config.moe_router_logit_softcapping
    return rule | {"logit_softcap": bound} if bound > 0 else rule


def lfm2_moe(config: PreTrainedConfig) -> dict[str, Any]:
    """`biased` with an optional bias."""
    rule = biased(config, normalize="norm_topk_prob", epsilon=1e-6, scale="routed_scaling_factor")
    return rule | {"selection_bias": bool(config.use_expert_bias)}


def llama4(config: PreTrainedConfig) -> dict[str, Any]:
    """Top-k over logits, then their sigmoids."""
    return {"top_k": _top_k(config), "score_function": "sigmoid", "select_by": "logits"}


def longcat_flash(config: PreTrainedConfig) -> dict[str, Any]:
    """Softmax over experts and zero-computation experts, a selection bias, scaled weights (arXiv 2509.01322).

    The stock router makes a bias of its logits if `router_bias` says so, but never adds it.
    """
    return {
        "type": "null_experts",
        "top_k": _top_k(config),
        "num_null": config.zero_expert_num or 0,
        "null_output": "identity",
        "normalize_over": "none",
        "scaling_factor": config.routed_scaling_factor,
        "selection_bias": True,
    }


def muse_spark(config: PreTrainedConfig) -> dict[str, Any]:
    """`biased` with scaled logits."""
    return biased(config, epsilon=1e-15, scale="routed_scaling_factor") | {"logit_scale": config.output_multiplier}


def groups(config: PreTrainedConfig, group_score: str) -> dict[str, Any]:
    """Fields of a group limit as DeepSeek's configs name it; one group is none."""
    for field in ("n_group", "topk_group"):
        if not getattr(config, field):
            raise unsupported(
                config, field, "is not a number of groups", "set n_group and topk_group to 1 for no groups"
            )
    if config.n_group == 1:
        return {}
    return {"num_groups": config.n_group, "top_k_groups": config.topk_group, "group_score": group_score}


def refuse_jitter(config: PreTrainedConfig) -> None:
    """Refuse noise on the input of the whole block."""
    if config.router_jitter_noise > 0:
        raise unsupported(config, "router_jitter_noise", JITTER, "set it to 0.0, which leaves inference as it is")


def _top_k(config: PreTrainedConfig, field: str = "num_experts_per_tok") -> int:
    if not getattr(config, field):
        raise unsupported(config, field, "picks no expert", "set it")
    return getattr(config, field)


def _normalize(config: PreTrainedConfig, normalize: Normalize) -> bool:
    return bool(config.norm_topk_prob) if normalize == "norm_topk_prob" else normalize == "always"


def _normalization(config: PreTrainedConfig, normalize: Normalize, epsilon: float) -> dict[str, Any]:
    applies = _normalize(config, normalize)
    return {"normalize_top_k": applies, "normalization_epsilon": epsilon if applies else 0.0}


def _score_function(config: PreTrainedConfig, field: str) -> str:
    name = getattr(config, field)
    if name not in SCORE_FUNCTIONS:
        raise unsupported(config, field, "is not a score function here", f"use one of {', '.join(SCORE_FUNCTIONS)}")
    return SCORE_FUNCTIONS[name]


def _masked_with_zero(rule: dict[str, Any]) -> dict[str, Any]:
    return rule | {"group_mask_value": "zero"} if "num_groups" in rule else rule
