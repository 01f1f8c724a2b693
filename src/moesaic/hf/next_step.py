"""What a model's forward pass takes for one token more than the pass before it."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel


def next_inputs(model: PreTrainedModel, inputs: dict[str, Any], output: Any, tokens_B: Tensor) -> dict[str, Any]:
    """Inputs that follow those of a forward pass, as `generate` would make them.

    Args:
        model: the model.
        inputs: of the pass, from `generate`. Its cache is left out: give the one that is to be continued.
        output: of the pass.
        tokens_B: the next token of each row.
    """
    uncached = inputs.get("use_cache") is False
    state = {name: value for name, value in inputs.items() if name not in ("input_ids", "inputs_embeds")}
    state = cast(Any, model)._update_model_kwargs_for_generation(output, state)
    state.pop("past_key_values", None)
    ids_BS = torch.cat([inputs["input_ids"], tokens_B[:, None]], 1) if uncached else tokens_B[:, None]
    return cast(Any, model).prepare_inputs_for_generation(
        ids_BS, next_sequence_length=None if uncached else 1, is_first_iteration=False, **state
    )
