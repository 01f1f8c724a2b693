"""The weak logits are those of another model, the amateur, with a cache of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moesaic.errors import ConfigError
from moesaic.hf.companion import Companion
from moesaic.infer.decode.contrast.passes import batch_of, check_fresh


class TwoModels:
    """`Passes` of which the weak one is another model's; all rows have one.

    Args:
        model: the expert, whose text is generated.
        amateur: a causal language model with the same vocabulary.
        mask_BS: attention mask of the prompts, None where nothing is padding.

    Raises:
        ConfigError: if the vocabularies differ in size.
        UnsupportedModel: if the amateur is no decoder with a cache.
    """

    def __init__(self, model: PreTrainedModel, amateur: PreTrainedModel, mask_BS: Tensor | None) -> None:
        check_vocabularies(model, amateur)
        self._model, self._amateur = model, Companion(amateur, mask_BS)
        self._begun = False
        self.weak_WV = torch.empty(0, 0)

    def __call__(self, inputs: dict[str, Any], /) -> Any:
        if not self._begun:
            check_fresh(inputs, batch_of(inputs))
            self._begun = True
        ids_BS = inputs.get("input_ids")
        if ids_BS is None:
            raise ConfigError("inputs_embeds", "given", "mean nothing to another model", "give input_ids")
        # Before the expert's pass, whose model may change in place what it is given.
        self.weak_WV = self._amateur.logits(ids_BS, use_cache=inputs.get("use_cache") is not False)
        return self._model(**inputs)

    def reorder(self, cache: Any, rows_B: Tensor, /) -> Any:
        cache.reorder_cache(rows_B)
        self._amateur.reorder(rows_B)
        return cache


def check_vocabularies(model: PreTrainedModel, amateur: PreTrainedModel) -> None:
    """Check that both have as many tokens.

    Raises:
        ConfigError: if they don't.
    """
    own, other = (given.config.get_text_config(decoder=True).vocab_size for given in (model, amateur))
    if own != other:
        raise ConfigError(
            "amateur",
            f"{type(amateur).__name__} of {other} tokens",
            f"has another vocabulary than the model, which has {own}",
            "give an amateur with the model's tokenizer",
        )
