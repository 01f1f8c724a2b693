"""Every contact with transformers' private or moving names, so that a version bump is one diff.

tests/hf/test_compat.py holds the canaries: they fail with a readable message when one of these names changes.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    initialization,
    masking_utils,
)
from transformers.configuration_utils import SubConfigSpec
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    revert_weight_conversion,
)
from transformers.integrations.deepgemm import is_deepgemm_loadable
from transformers.integrations.moe import ExpertsInterface, use_experts_implementation
from transformers.integrations.sonicmoe import is_sonicmoe_loadable
from transformers.modeling_utils import remove_tied_weights_from_state_dict

__all__ = [
    "Concatenate",
    "MergeModulelist",
    "SubConfigSpec",
    "WeightConverter",
    "WeightRenaming",
    "around_init_weights",
    "backbone_class",
    "causal_lm_class",
    "experts_function",
    "initialization",
    "may_pick_no_expert",
    "missing_for_experts_function",
    "not_drawn",
    "on_meta_device",
    "register_conversion",
    "register_experts_function",
    "revert_weight_conversion",
    "skip_no_expert",
    "use_experts_implementation",
    "whole_sequences",
    "without_storage",
    "without_tied_names",
    "wrap_method",
]

_NOT_DRAWN: ContextVar[bool] = ContextVar("not_drawn", default=False)


def register_experts_function(name: str, function: Callable[[Any, Tensor, Tensor, Tensor], Tensor]) -> None:
    """Make `name` a legal `experts_implementation` for every model of transformers."""
    ExpertsInterface.register(name, function)


def experts_function(name: str) -> Callable[[Any, Tensor, Tensor, Tensor], Tensor]:
    """The function behind an `experts_implementation`."""
    return ExpertsInterface._global_mapping[name]


@torch.compiler.assume_constant_result
def missing_for_experts_function(name: str) -> str | None:
    """What "sonicmoe" or "deepgemm" need and this machine lacks; None if they can be loaded."""
    check = {"sonicmoe": is_sonicmoe_loadable, "deepgemm": is_deepgemm_loadable}[name]
    try:
        check(raise_error=True)
    except ImportError as error:
        return str(error)
    return None


def skip_no_expert(experts: Any) -> None:
    """Make transformers' experts functions skip picks of index N in a module under `use_experts_implementation`.

    They do so for the picks that expert parallelism sends to other ranks, and only when this flag says that there are
    some. Without it "grouped_mm" adds uninitialised rows and "batched_mm" reads past the last expert.
    """
    experts._is_expert_parallel = True


def may_pick_no_expert(experts: Any) -> bool:
    """Whether a module under `use_experts_implementation` may get picks of index N."""
    return experts._is_expert_parallel


def register_conversion(name: str, mapping: list[WeightConverter | WeightRenaming]) -> None:
    """Register how checkpoints of a model type or class name map to parameters."""
    register_checkpoint_conversion_mapping(name, mapping, overwrite=True)


def backbone_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The base model class (without head) of a config."""
    # Some configs map to several classes, their main one first.
    found: Any = AutoModel._model_mapping[type(config)]
    return found[0] if isinstance(found, tuple | list) else found


def causal_lm_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The model class with language-model head of a config."""
    found: Any = AutoModelForCausalLM._model_mapping[type(config)]
    return found


def on_meta_device() -> bool:
    """Whether modules made now are made without storage, as `from_pretrained` does."""
    return torch.get_default_device() == torch.device("meta")


def without_tied_names(state: dict[str, Tensor], model: PreTrainedModel) -> dict[str, Tensor]:
    """A state dict on the meta device without the names that `save_pretrained` leaves out because another says the same."""
    return remove_tied_weights_from_state_dict(dict(state), model)


@contextlib.contextmanager
def without_storage() -> Iterator[None]:
    """Build modules on the meta device as a step of building a model, wherever that is built itself.

    Whoever writes down the random numbers that building takes can tell by `not_drawn` that none are taken here.
    """
    token = _NOT_DRAWN.set(True)
    try:
        with torch.device("meta"):
            yield
    finally:
        _NOT_DRAWN.reset(token)


def not_drawn() -> bool:
    """Whether modules are being built `without_storage`."""
    return _NOT_DRAWN.get()


@contextlib.contextmanager
def around_init_weights(on_meta: Callable[[PreTrainedModel], None]) -> Iterator[None]:
    """Call `on_meta` whenever a model that is built on the meta device comes to the point of initialising its weights.

    Transformers initialises nothing there. Parts that are built `without_storage` don't count: they never do.
    """
    original = PreTrainedModel.init_weights

    @functools.wraps(original)
    def init_weights(self: PreTrainedModel) -> None:
        if not not_drawn():
            on_meta(self)
        original(self)

    PreTrainedModel.init_weights = init_weights
    try:
        yield
    finally:
        PreTrainedModel.init_weights = original


def wrap_method(owner: Any, name: str, around: Callable[..., Any]) -> Callable[[], None]:
    """Run `around(method, *args, **kwargs)` in place of a method of one object; its class stays as it is.

    Returns:
        What takes it out again. If something wrapped the method meanwhile, it then calls through.
    """
    method, had_own, active = getattr(owner, name), name in vars(owner), True

    @functools.wraps(method)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return around(method, *args, **kwargs) if active else method(*args, **kwargs)

    def undo() -> None:
        nonlocal active
        active = False
        if vars(owner).get(name) is wrapped:
            if had_own:
                setattr(owner, name, method)
            else:
                delattr(owner, name)

    setattr(owner, name, wrapped)
    return undo


@contextlib.contextmanager
def whole_sequences() -> Iterator[None]:
    """Models called in here on fake tensors take each row for one sequence, as they do on real ones.

    Transformers looks at position ids for several sequences packed in a row. It can't read fake ones, takes them for
    packed, and makes a mask that a real run does not have.
    """
    found = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = found
