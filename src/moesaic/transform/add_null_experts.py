"""Null experts for a trained model: the same function at first, with room for tokens to run fewer experts (AdaMoE)."""

from __future__ import annotations

from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from moesaic.errors import ConfigError
from moesaic.hf import MoesaicForCausalLM
from moesaic.hf.transplant import respecify
from moesaic.layer import MoESpec, NullExpertsConfig, TopKConfig

# Fields of a top-k router that one with null experts can say, or that do not change what a trained model computes.
_CARRIED = {
    "type",
    "top_k",
    "softmax_over",
    "normalize_top_k",
    "normalization_epsilon",
    "normalization_floor",
    "scaling_factor",
    "linear_bias",
    "stable_ties",
}


def add_null_experts(
    model: MoesaicForCausalLM,
    num_null: int,
    top_k: int | None = None,
    *,
    exact: bool = True,
    tie_margin: float = 1e-5,
) -> MoesaicForCausalLM:
    """A copy of `model` whose routers have null experts beside the experts; outputs are those of `model` at first.

    The rows of the nulls are copies of the experts' rows, c = num_null / N of each (AdaMoE, arXiv 2406.13233, section
    3.5). Every expert then ties with its copies, and ties go to experts. With K = (K0 - 1)(c + 1) + 1 picks, K0 of them
    fall on experts, the K0 of before: for K0 = 2 these are the paper's settings K = c + 2. Routers whose weights are
    plain softmax scores keep them by a `scaling_factor` c + 1 times as large. Train on with a `load_balancing` loss, which
    brings the load from K0 towards K N / (N + num_null).

    Args:
        model: with top-k routers on softmax scores. It is left as it is, and shares no memory with the result.
        num_null: null experts of each layer, a multiple of N.
        top_k: picks of a token, nulls included; by default the K that keeps the outputs.
        exact: insist that outputs are kept; set it to False for another K, or in the presence of a capacity.
        tie_margin: see `NullExpertsConfig`; copies' logits may be rounded otherwise than those of their experts.

    Raises:
        ConfigError: if the routers of `model` are of another kind or use what routers with null experts don't have,
            `num_null` is not a multiple of N, or `exact` can't be kept.
    """
    spec = model.config.spec
    router, num_experts = _check_source(spec), spec.experts.num_experts
    if num_null < num_experts or num_null % num_experts:
        near = max(round(num_null / num_experts), 1) * num_experts
        raise ConfigError(
            "num_null", num_null, f"is not a multiple of num_experts ({num_experts})", f"choose {near}, for example"
        )
    copies = num_null // num_experts
    exact_top_k = (router.top_k - 1) * (copies + 1) + 1
    if exact:
        _check_exact(spec, router, top_k, exact_top_k)
    normalised = router.normalize_top_k or router.softmax_over == "selected"
    changed = NullExpertsConfig(
        top_k=top_k or exact_top_k,
        num_null=num_null,
        normalize_over="experts" if normalised else "none",
        scaling_factor=router.scaling_factor if normalised else router.scaling_factor * (copies + 1),
        tie_margin=tie_margin,
        linear_bias=router.linear_bias,
    )
    target = MoESpec.from_dict({**spec.to_dict(), "router": changed.to_dict()}, where="moe")
    return respecify(model, target, partial(_with_copies, times=copies + 1))


def _with_copies(block: nn.Module, times: int) -> dict[str, Tensor]:
    """State dict of a block whose router has every row `times` times, the experts' first."""
    state = cast(dict[str, Tensor], block.state_dict())
    for name in ("gate.weight", "gate.bias"):
        if name in state:
            state[name] = torch.cat([state[name]] * times)
    return state


def _check_source(spec: MoESpec) -> TopKConfig:
    router = spec.router
    if not isinstance(router, TopKConfig):
        raise ConfigError(
            "moe.router.type", router.type, "can't be given null experts", "use a model with top_k routers"
        )
    if spec.per_layer:
        raise ConfigError(
            "moe.layers",
            spec.layers.to_dict(),
            "lets layers differ in experts or picks, so that one number of nulls would not fit all",
            "use a model whose layers are alike",
        )
    for name, field in type(router).model_fields.items():
        value = getattr(router, name)
        if name not in _CARRIED and value != field.get_default():
            raise ConfigError(
                f"moe.router.{name}",
                value,
                "is not known to routers with null experts",
                f"needs {field.get_default()!r}",
            )
    return router


def _check_exact(spec: MoESpec, router: TopKConfig, top_k: int | None, exact_top_k: int) -> None:
    if top_k is not None and top_k != exact_top_k:
        raise ConfigError(
            "top_k",
            top_k,
            "changes which experts run",
            f"leave it out, for {exact_top_k}, or set exact=False if that is meant",
        )
    for name in ("normalization_epsilon", "normalization_floor"):
        value = getattr(router, name)
        if router.normalize_top_k and value > torch.finfo(torch.float32).eps:
            raise ConfigError(
                f"moe.router.{name}",
                value,
                "is in the weights of the model, and routers with null experts have none",
                "set exact=False to go without",
            )
    if spec.capacity is not None:
        raise ConfigError(
            "moe.capacity",
            spec.capacity.to_dict(),
            "follows from the number of picks, which null experts change",
            "use a model without, or set exact=False if that is meant",
        )


__all__ = ["add_null_experts"]
