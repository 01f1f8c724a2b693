"""What continues a batch of prompts: `generate` of transformers in any of its ways, or a function of one's own."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList

from moesaic.infer.decode import DecodingStrategy
from moesaic.infer.decode.row_sampler import RowSampler, warpers

_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")


@dataclass(frozen=True)
class PromptBatch:
    """Prompts to continue.

    Attributes:
        input_ids_BS: token ids, padded on the left.
        attention_mask_BS: 0 on padding.
        seeds: of each row; a decoding that honours them gives a row the same tokens in any batch (`RowSampler`).
        max_new_tokens: most tokens to add.
        stopping: which rows have ended, beside those at an end-of-sequence token; None for no such rule.
        pad_token_id: what follows in rows that have ended.
    """

    input_ids_BS: Tensor
    attention_mask_BS: Tensor
    seeds: tuple[int, ...]
    max_new_tokens: int
    stopping: StoppingCriteriaList | None
    pad_token_id: int


class Decoding(Protocol):
    """Continues prompts. Anything that is called like this can be sampled from, voted over and evaluated."""

    def __call__(self, model: PreTrainedModel, batch: PromptBatch, /) -> Tensor:
        """The prompts with their continuations, (B, S + new tokens)."""
        ...


class Generate:
    """`model.generate` as a `Decoding`.

    Sampling, plain and with a decoding of this library (`moesaic.SelfContrast`), gives each row random numbers of its own:
    the same seed gives the same text whatever else is in the batch, up to rounding that depends on its shape. It samples
    with what is set here alone: a temperature or top-k in the model's own generation config is not used. Beam search that
    samples, and any other `custom_generate`, draw from torch's generator, which is seeded for each batch and put back
    afterwards: the same seed gives the same text in the same batch.

    Args:
        config: of transformers; None for greedy decoding, or what `options` say.
        custom_generate: a decoding of this library, or a loop for `generate` with the arguments that transformers documents.
        options: fields of `GenerationConfig`, or keywords of `custom_generate`.
    """

    def __init__(
        self,
        config: GenerationConfig | None = None,
        *,
        custom_generate: Callable[..., Any] | None = None,
        **options: Any,
    ) -> None:
        self.config = copy.deepcopy(config) if config is not None else GenerationConfig()
        self._left = self.config.update(**options)
        self._custom = custom_generate
        if self.config.do_sample is None:
            self.config.do_sample = False

    @property
    def repeats(self) -> bool:
        """Whether all samples of a prompt are equal."""
        if isinstance(self._custom, DecodingStrategy) and not self._custom.samples:
            return True
        return not self.config.do_sample and (self._custom is None or self._ours)

    @property
    def has_weak_pass(self) -> bool:
        """Whether a second pass reads every token too."""
        return isinstance(self._custom, DecodingStrategy) and self._custom.has_weak_pass

    @property
    def _ours(self) -> bool:
        """Whether tokens are taken from scores as in `generate`, so that only `do_sample` makes them random."""
        return isinstance(self._custom, DecodingStrategy)

    def __call__(self, model: PreTrainedModel, batch: PromptBatch, /) -> Tensor:
        """The prompts with their continuations, (B, S + new tokens)."""
        config, processors = copy.deepcopy(self.config), None
        if config.do_sample and (self._custom is None or self._ours) and (config.num_beams or 1) == 1:
            processors = LogitsProcessorList([RowSampler(batch.seeds, warpers(config))])
            config.do_sample = False  # the sampler leaves one token to take
            for name in _SAMPLING:
                setattr(config, name, None)
        config.max_new_tokens, config.pad_token_id = batch.max_new_tokens, batch.pad_token_id
        config.num_return_sequences, config.return_dict_in_generate = 1, False
        devices = [model.device] if model.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(hash(batch.seeds) & (2**63 - 1))  # a hash of integers is the same in every process
            return self._generate(model)(
                input_ids=batch.input_ids_BS,
                attention_mask=batch.attention_mask_BS,
                generation_config=config,
                logits_processor=processors,
                stopping_criteria=batch.stopping,
                **self._left,
            )

    def _generate(self, model: PreTrainedModel) -> Callable[..., Any]:
        if isinstance(self._custom, DecodingStrategy):
            return functools.partial(self._custom.generate, model)  # which refuses what it can't honour
        return functools.partial(cast(Any, model).generate, custom_generate=self._custom)
