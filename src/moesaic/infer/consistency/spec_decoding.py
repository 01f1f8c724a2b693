"""A decoding that is data, as one that prompts are sampled, voted over and evaluated with."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from moesaic.infer.consistency.decoding import Generate, PromptBatch
from moesaic.infer.decode import DecodingSpec


class SpecDecoding(Generate):
    """`Generate` by a spec: its strategy, its sampling and, around each batch, its routing.

    Multiple choice is scored by the same spec: see `DecodingSpec.logits`.

    Args:
        spec: says the decoding.
        options: further fields of `GenerationConfig`.

    Attributes:
        spec: the same.
    """

    def __init__(self, spec: DecodingSpec, **options: Any) -> None:
        super().__init__(custom_generate=spec.strategy, **{**options, **spec.options})
        self.spec = spec

    def __call__(self, model: PreTrainedModel, batch: PromptBatch, /) -> Tensor:
        """The prompts with their continuations, (B, S + new tokens)."""
        with self.spec.routing(model):
            return super().__call__(model, batch)
