"""Next-token logits of the layers before the last one, by the model's own head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from moesaic.errors import UnsupportedModel
from moesaic.hf.families import FAMILIES

# What decoders call the norm between their last layer and their head.
_FINAL_NORMS = ("norm", "ln_f", "final_layernorm", "final_layer_norm", "norm_f")


def num_layers(model: PreTrainedModel) -> int:
    """The number of its decoder layers."""
    return int(model.config.get_text_config(decoder=True).num_hidden_layers)


def has_tied_head(model: PreTrainedModel) -> bool:
    """Whether its head is its token embedding, so that what goes in comes out again without a layer between."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    return head is not None and cast(Any, head).weight is cast(Any, embedding).weight


class EarlyExits:
    """A model's head for the hidden states of earlier layers.

    Args:
        model: a causal language model.
        layers: after which to exit; 0 is the token embedding, 1 the first layer.
        normalise: apply the final norm before the head, as the last layer's output has it.

    Raises:
        UnsupportedModel: if the model has no head, or no final norm is found that is asked for.
    """

    def __init__(self, model: PreTrainedModel, layers: Sequence[int], *, normalise: bool) -> None:
        head = model.get_output_embeddings()
        if head is None or model.config.is_encoder_decoder:
            raise UnsupportedModel(f"{type(model).__name__} is no decoder with a head; give a causal language model")
        self._name, self._layers, self._head = type(model).__name__, tuple(layers), cast(nn.Module, head)
        self._norm = _final_norm(model) if normalise else None
        self._finish = _finish(model.config)
        self._is_checked = False

    def logits(self, output: Any) -> Tensor:
        """Logits after the last token by layer, (L, B, V).

        Args:
            output: of the model, with all hidden states.

        Raises:
            UnsupportedModel: if the head does not give the model's own logits for its last hidden state.
        """
        states: tuple[Tensor, ...] | None = output.hidden_states
        if states is None:
            raise UnsupportedModel(f"{self._name} returns no hidden states; give a model that does")
        if not self._is_checked:
            self._check(states[-1][:, -1], output.logits[:, -1])
        exits = [states[layer][:, -1] for layer in self._layers]
        return torch.stack([self._read(state_BD if self._norm is None else self._norm(state_BD)) for state_BD in exits])

    def _read(self, state_BD: Tensor) -> Tensor:
        logits_BV = self._head(state_BD.to(cast(Any, self._head).weight.device))
        return self._finish(logits_BV)

    def _check(self, last_BD: Tensor, logits_BV: Tensor) -> None:
        """Families scale and cap logits in ways that only their forward pass knows: compare with it, once."""
        found_BV = self._read(last_BD).to(logits_BV)
        scale = float(logits_BV.float().abs().max())
        tolerance = 8 * torch.finfo(logits_BV.dtype).eps
        if not torch.allclose(found_BV.float(), logits_BV.float(), rtol=tolerance, atol=max(tolerance, 1e-5) * scale):
            raise UnsupportedModel(
                f"{self._name} does more between its last hidden state and its logits than its head, so that logits of "
                f"earlier layers can't be had; families that work are {', '.join(sorted(FAMILIES))}"
            )
        self._is_checked = True


def _final_norm(model: PreTrainedModel) -> nn.Module:
    decoder = model.get_decoder()
    decoder = getattr(decoder, "backbone", decoder)  # of our own models
    for name in _FINAL_NORMS:
        if isinstance(norm := getattr(decoder, name, None), nn.Module):
            return norm
    raise UnsupportedModel(f"{type(model).__name__} has no final norm that is known; exit without norm")


def _finish(config: PreTrainedConfig) -> Callable[[Tensor], Tensor]:
    """What the family does to the head's output."""
    text = config.get_text_config(decoder=True)
    backbone = getattr(text, "backbone", None)
    text = text if backbone is None else backbone
    family = FAMILIES.get(text.model_type)
    return lambda logits: logits if family is None else family.finish_logits(logits, text)
