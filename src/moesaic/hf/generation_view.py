"""Running the loops of transformers' `generate` over something else than one forward pass of a model."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol, cast

from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.configuration_utils import GenerationMode

from moesaic.errors import ConfigError

# The methods behind the modes that know only next-token scores and a cache whose rows can be reordered.
_LOOPS = {
    GenerationMode.GREEDY_SEARCH: "_sample",
    GenerationMode.SAMPLE: "_sample",
    GenerationMode.BEAM_SEARCH: "_beam_search",
    GenerationMode.BEAM_SAMPLE: "_beam_search",
}


class Step(Protocol):
    """Computes the next-token logits of a batch."""

    def __call__(self, inputs: dict[str, Any], /) -> Any:
        """The model's output for the inputs of one of its forward passes: logits (B, S, V), and the cache."""
        ...

    def reorder(self, cache: Any, rows_B: Tensor, /) -> Any:
        """The cache in which row b continues what row `rows_B[b]` was, with all else that is kept for rows."""
        ...


class _Viewed:
    """Mixin before a model's class."""

    __slots__ = ("_step",)
    _step: Step

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        assert not args, "generate calls models by keyword"
        return self._step(kwargs)

    def _reorder_cache(self, past_key_values: Any, beam_idx: Tensor) -> Any:
        return self._step.reorder(past_key_values, beam_idx)


@functools.cache
def _view_class(plain: type[PreTrainedModel]) -> type[PreTrainedModel]:
    names = {"__module__": plain.__module__, "__qualname__": plain.__qualname__, "__doc__": plain.__doc__}
    return type(plain.__name__, (_Viewed, plain), {**names, "__slots__": ()})


def view(model: PreTrainedModel, step: Step) -> PreTrainedModel:
    """The same model, sharing all state with it, whose call is `step`.

    transformers' loops are methods of models. Another call on the side, instead of a changed model, leaves other threads
    and everything that holds the model alone.
    """
    kind = _view_class(type(model))
    made = object.__new__(kind)  # what a sharded model makes is of its class before sharding
    object.__setattr__(made, "__dict__", model.__dict__)
    object.__setattr__(made, "_step", step)
    return made


def generate_with(model: PreTrainedModel, step: Step, input_ids: Tensor, config: GenerationConfig, **given: Any) -> Any:
    """Continue prompts with transformers' own loop for sampling, greedy or beam search, in which `step` stands for the model.

    Args:
        model: the model.
        step: computes its logits.
        input_ids: (B, S).
        config: as `generate` prepared it.
        given: all else that `generate` hands to a decoding loop.

    Returns:
        What `generate` returns.

    Raises:
        ConfigError: if the config asks for another mode of generation.
    """
    mode = config.get_generation_mode()
    if mode not in _LOOPS:
        raise ConfigError(
            "generation mode",
            mode.value,
            "can't be combined with a decoding that makes scores of its own",
            f"use one of {', '.join(known.value for known in _LOOPS)}",
        )
    config.disable_compile = True  # a step is more than one graph
    loop = cast(Callable[..., Any], getattr(type(model), _LOOPS[mode]))
    return loop(view(model, step), input_ids, generation_config=config, **given)
