"""Upcycling: a dense model becomes an MoE model whose experts are copies of its feed-forward networks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moesaic.errors import ConfigError
from moesaic.hf import MoesaicForCausalLM
from moesaic.hf.backbone import norm_like
from moesaic.hf.families import family_of, feed_forward_weights
from moesaic.hf.feed_forward import FeedForwardWeights, read
from moesaic.hf.transplant import decoder_layers, transplant
from moesaic.layer import MoEBlock, MoESpec, Router, TopKConfig


def copy_spec(dense_model: PreTrainedModel, *, num_experts: int, top_k: int) -> MoESpec:
    """The spec for function-preserving upcycling of `dense_model`: N copies, K picks whose weights sum to 1.

    Raises:
        UnsupportedModel: if the model's family can't be a backbone.
        ConfigError: if top_k is larger than num_experts.
    """
    weights = _first_layer(dense_model)
    family = family_of(dense_model.config)
    return MoESpec.from_dict(
        {
            "experts": {
                "num_experts": num_experts,
                "intermediate_size": weights.intermediate_size,
                "activation": getattr(dense_model.config, family.activation),
                "gated": weights.gated,
                "bias": weights.up_bias_H is not None,
            },
            "router": {"top_k": top_k, "normalize_top_k": True},
            "dropout": 0.0 if family.dropout is None else getattr(dense_model.config, family.dropout),
        },
        where="moe",
    )


def upcycle(
    dense_model: PreTrainedModel,
    spec: MoESpec | Mapping[str, Any],
    *,
    noise: float = 0.0,
    exact: bool = True,
    seed: int = 0,
) -> MoesaicForCausalLM:
    """Make an MoE model of a dense one; without noise its logits are the dense model's at step 0.

    Every expert of a layer is a copy of that layer's feed-forward network (sparse upcycling, arXiv 2212.05055). As the
    weights of a token's picks sum to 1, it does not matter which copies are picked. Shared experts start with a zero
    output projection, and behind the layer with a copy of its norm. The router starts random.

    Args:
        dense_model: a stock `...ForCausalLM`.
        spec: the MoE layers, also as a dict; `copy_spec` gives one that fits.
        noise: standard deviation of Gaussian noise added to each expert, relative to that of the copied tensor.
        exact: insist that logits are preserved; set it to False for noise or for routers whose weights do not sum to 1.
        seed: of router weights and noise.

    Raises:
        UnsupportedModel: if the model's family can't be a backbone or its feed-forward networks are not dense.
        ConfigError: if the experts do not have the shape of the feed-forward network, or `exact` can't be kept.
    """
    if not isinstance(spec, MoESpec):
        spec = MoESpec.from_dict(spec, where="moe")
    _check(spec, _first_layer(dense_model), dense_model)
    if exact:
        _check_exact(spec, noise)
    generator = torch.Generator().manual_seed(seed)
    hidden_size = dense_model.config.hidden_size
    stock_layers = decoder_layers(dense_model.base_model, dense_model.config)
    layers = spec.layers.indices(len(stock_layers))
    follows = spec.shared_experts is not None and spec.shared_experts.placement == "after"
    first: list[Router] = []

    def block_tensors(module: nn.Module) -> dict[str, Tensor]:
        weights = read(module)
        assert weights is not None  # all layers have the layout of the first
        position = next(positions)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
            norm = norm_like(stock_layers[layers[position]], dense_model.config) if follows else None
            block = MoEBlock(spec.at(position), hidden_size, layers[position], norm=norm)
            block.gate.reset_parameters()  # tables that differ by layer: only now does it know its own
        if first:
            block.gate.share(first[0])
        first.append(block.gate)
        return _tensors(block, weights, noise, generator)

    positions = iter(range(len(layers)))

    return transplant(dense_model, spec, block_tensors)


def _first_layer(dense_model: PreTrainedModel) -> FeedForwardWeights:
    family = family_of(dense_model.config)
    layers = decoder_layers(dense_model.base_model, dense_model.config)
    return feed_forward_weights(layers[0], family, dense_model.config.model_type)


def _tensors(
    block: MoEBlock, weights: FeedForwardWeights, noise: float, generator: torch.Generator
) -> dict[str, Tensor]:
    """State dict of a fresh MoE block whose experts are copies of `weights`, in their dtype and on their device."""

    def copies(tensor: Tensor) -> Tensor:
        stacked = tensor.expand(block.gate.num_experts, *tensor.shape)
        if not noise:
            return stacked
        sample = torch.randn(stacked.shape, generator=generator).to(device=tensor.device, dtype=tensor.dtype)
        return stacked + noise * tensor.std() * sample

    # A cast of the module, which leaves tables of integers and what must stay in full precision as they are.
    state = block.to(device=weights.down_DF.device, dtype=weights.down_DF.dtype).state_dict()
    up = "gate_up_proj" if weights.gated else "up_proj"
    state[f"experts.{up}"], state["experts.down_proj"] = copies(weights.up_HD), copies(weights.down_DF)
    if weights.up_bias_H is not None and weights.down_bias_D is not None:
        state[f"experts.{up}_bias"], state["experts.down_proj_bias"] = (
            copies(weights.up_bias_H),
            copies(weights.down_bias_D),
        )
    for name, tensor in state.items():
        if name.startswith("shared_experts.down_proj"):
            tensor.zero_()
    return state


def _check(spec: MoESpec, weights: FeedForwardWeights, dense_model: PreTrainedModel) -> None:
    if spec.dense_layers is not None:
        raise ConfigError(
            "moe.dense_layers", spec.dense_layers.to_dict(), "replaces layers that upcycling keeps", "remove it"
        )
    needed = {
        "intermediate_size": weights.intermediate_size,
        "gated": weights.gated,
        "bias": weights.up_bias_H is not None,
        "activation": getattr(dense_model.config, family_of(dense_model.config).activation),
    }
    for field, value in needed.items():
        given = getattr(spec.experts, field)
        if given != value:
            raise ConfigError(
                f"moe.experts.{field}", given, "differs from the dense feed-forward network", f"set it to {value!r}"
            )


def _check_exact(spec: MoESpec, noise: float) -> None:
    if noise:
        raise ConfigError("noise", noise, "changes the logits at step 0", "set exact=False if that is meant")
    for name, part in (("capacity", spec.capacity), ("depth", spec.depth)):
        if part is not None:
            raise ConfigError(
                f"moe.{name}",
                part.to_dict(),
                "leaves tokens without experts, which changes the logits at step 0",
                "remove it, or set exact=False if that is meant",
            )
    router = spec.router
    if not isinstance(router, TopKConfig):
        raise ConfigError(
            "moe.router.type", router.type, "is not known to preserve logits at step 0", "use top_k, or exact=False"
        )
    if not (router.normalize_top_k or router.softmax_over == "selected"):
        raise ConfigError(
            "moe.router.normalize_top_k",
            False,
            "lets the weights of a token sum to less than 1, which changes the logits at step 0",
            "set it to true, or exact=False if that is meant",
        )
    for field in ("normalization_epsilon", "normalization_floor"):
        value = getattr(router, field)
        if router.normalize_top_k and value > torch.finfo(torch.float32).eps:
            raise ConfigError(
                f"moe.router.{field}",
                value,
                "lets the weights of a token sum to less than 1, which changes the logits at step 0",
                "set it to 0, or exact=False if that is meant",
            )
    if router.normalization_order != 1.0:
        raise ConfigError(
            "moe.router.normalization_order",
            router.normalization_order,
            "lets the weights of a token sum to another number than 1, which changes the logits at step 0",
            "set it to 1, or exact=False if that is meant",
        )
    if router.scaling_factor != 1.0:
        raise ConfigError(
            "moe.router.scaling_factor", router.scaling_factor, "changes the logits at step 0", "set it to 1.0"
        )


__all__ = ["copy_spec", "upcycle"]
