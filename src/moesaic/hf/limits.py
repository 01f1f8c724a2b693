"""What a router's mechanism rules out, refused before any work is done."""

from __future__ import annotations

from transformers import PreTrainedConfig

from moesaic.errors import ConfigError
from moesaic.layer import MoESpec, RoutingContext
from moesaic.layer.routers.base import Need

_ARGUMENTS: dict[Need, tuple[str, str]] = {
    "token_ids": ("input_ids", "token_ids_T"),
    "modality": ("modality_ids", "modality_T"),
    "task": ("task_ids", "task_B"),
}


def check_needs(context: RoutingContext, needs: frozenset[Need]) -> None:
    """Refuse a forward pass that was not given what its routers look at.

    Raises:
        ConfigError: naming the missing argument of the model's forward.
    """
    for need in sorted(needs):
        argument, attribute = _ARGUMENTS[need]
        if getattr(context, attribute) is None:
            raise ConfigError(
                argument,
                None,
                f"is required: the router of this model looks at {need}",
                f"call the model with {argument}"
                + ("" if need == "token_ids" else f"; a run with data.domains_are: {need} gives its own text's"),
            )


def check_pipeline(config: PreTrainedConfig, spec: MoESpec) -> None:
    """Refuse pipeline stages for routers that hand a state from layer to layer, which stages do not pass on.

    Args:
        config: whose `distributed_config` transformers sets before it makes the model.
        spec: the MoE layers.

    Raises:
        ConfigError: naming the number of stages.
    """
    stages = getattr(getattr(config, "distributed_config", None), "pp_size", None) or 1
    if stages > 1 and spec.router.carries_state:
        raise ConfigError(
            "distributed_config.pp_size",
            stages,
            f"cuts a model whose {spec.router.type} router hands its state from layer to layer; "
            "pipeline stages pass hidden states only",
            "set pp_size to 1 and use data, expert or tensor parallelism",
        )


def check_vocabulary(config: PreTrainedConfig, spec: MoESpec) -> None:
    """Refuse routers by token id that know fewer ids than the model has.

    Args:
        config: whose text config says how many ids there are.
        spec: the MoE layers.

    Raises:
        ConfigError: naming the router's field.
    """
    known = getattr(spec.router, "vocabulary_size", None)
    size = config.get_text_config().vocab_size
    if known is not None and known < size:
        raise ConfigError(
            "moe.router.vocabulary_size", known, f"is smaller than the model's vocabulary ({size})", f"set it to {size}"
        )
