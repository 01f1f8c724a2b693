"""A second model that reads what another one generates."""

from __future__ import annotations

import inspect
from typing import Any, cast

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from moesaic.errors import UnsupportedModel


class Companion:
    """Next-token logits of a model for the prompts, and then the tokens, of another one's generation.

    It prepares its own inputs: the families may differ in what their forward passes take, and in their caches.

    Args:
        model: the model that reads along.
        mask_BS: 1 for tokens of the prompts, 0 for padding on their left; None where there is no padding.

    Raises:
        UnsupportedModel: if the model is no decoder with a cache.
    """

    def __init__(self, model: PreTrainedModel, mask_BS: Tensor | None) -> None:
        accepted = inspect.signature(model.forward).parameters
        cached = getattr(model, "_supports_default_dynamic_cache", None)
        if model.config.is_encoder_decoder or "past_key_values" not in accepted or cached is None or not cached():
            raise UnsupportedModel(
                f"{type(model).__name__} can't read along: it is no decoder with a key-value cache; "
                "give a causal language model that has one"
            )
        self._model = model
        self._takes = frozenset(accepted)
        self._mask_BS = None if mask_BS is None else mask_BS.to(model.device)
        self._cache: Cache | None = None

    def logits(self, ids_BS: Tensor, *, use_cache: bool) -> Tensor:
        """Logits after the last of these tokens, (B, V).

        Args:
            ids_BS: tokens that follow those of earlier calls, or the whole sequences where there is no cache.
            use_cache: keep keys and values for the next call.
        """
        ids_BS = ids_BS.to(self._model.device)
        if use_cache and self._cache is None:
            self._cache = DynamicCache(config=self._model.config.get_text_config(decoder=True))
        past = 0 if self._cache is None else int(self._cache.get_seq_length())
        given: dict[str, Any] = {
            "past_key_values": self._cache,
            "use_cache": use_cache,
            "attention_mask": self._mask_until(past + ids_BS.shape[1]),
            "return_dict": True,
        }
        if "position_ids" in self._takes:
            given["position_ids"] = self._positions(ids_BS, past)
        if "logits_to_keep" in self._takes:
            given["logits_to_keep"] = 1
        model = cast(Any, self._model)
        output = model(**model.prepare_inputs_for_generation(ids_BS, is_first_iteration=past == 0, **given))
        return output.logits[:, -1]

    def reorder(self, rows_B: Tensor) -> None:
        """Row b continues what row `rows_B[b]` was. Masks stay: beams take the place of others of the same prompt."""
        if self._cache is not None:
            cast(Any, self._cache).reorder_cache(rows_B.to(self._model.device))

    def _mask_until(self, length: int) -> Tensor | None:
        """The mask of all tokens so far; generated ones are never padding to those that attend to them."""
        if self._mask_BS is None:
            return None
        missing = length - self._mask_BS.shape[1]
        if missing > 0:
            self._mask_BS = torch.cat([self._mask_BS, self._mask_BS.new_ones(len(self._mask_BS), missing)], 1)
        return self._mask_BS[:, :length]

    def _positions(self, ids_BS: Tensor, past: int) -> Tensor:
        length = past + ids_BS.shape[1]
        mask = self._mask_until(length)
        if mask is None:
            return torch.arange(past, length, device=ids_BS.device)[None]
        return (mask.long().cumsum(1) - 1).clamp(min=0)[:, past:]
