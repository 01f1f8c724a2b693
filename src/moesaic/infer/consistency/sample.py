"""Continuations of prompts by any decoding, in batches, with their seeds and what they cost."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteriaList

from moesaic.errors import ConfigError
from moesaic.hf import MoesaicForCausalLM
from moesaic.infer.consistency.decoding import Decoding, PromptBatch
from moesaic.infer.consistency.stop import StopText, cut
from moesaic.infer.decode.row_sampler import row_seed


@dataclass(frozen=True)
class Usage:
    """What was computed.

    Attributes:
        prompt_tokens: read, once for every sample of a prompt.
        generated_tokens: emitted, without padding.
        scored_tokens: read again to score samples.
        seconds: wall clock.
        weak_tokens: read by weak passes of contrasts.
    """

    prompt_tokens: int = 0
    generated_tokens: int = 0
    scored_tokens: int = 0
    seconds: float = 0.0
    weak_tokens: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.prompt_tokens + other.prompt_tokens,
            self.generated_tokens + other.generated_tokens,
            self.scored_tokens + other.scored_tokens,
            self.seconds + other.seconds,
            self.weak_tokens + other.weak_tokens,
        )


@dataclass(frozen=True)
class Sample:
    """One continuation.

    Attributes:
        prompt: what it continues.
        number: which sample of the prompt, from 0.
        text: what was generated, without special tokens, up to the stop text.
        prompt_ids: tokens of the prompt.
        ids: tokens generated, with the end-of-sequence token if there is one.
        ended: by what: the end-of-sequence token, a stop text, or the length.
        weak_tokens: read for it by a weak pass.
    """

    prompt: str
    number: int
    text: str
    prompt_ids: tuple[int, ...]
    ids: tuple[int, ...]
    ended: Literal["eos", "stop", "length"]
    weak_tokens: int = 0


class Sampler:
    """Draws samples of prompts from a model.

    Args:
        model: any causal language model of ours or transformers.
        tokenizer: its own; it must have a pad token, unless `pad_token_id` is given.
        decoding: continues prompts.
        max_new_tokens: most tokens of a sample.
        stop: texts at which a sample ends; they are not part of it.
        batch_size: samples in a batch.
        seed: with the prompt and the number of a sample it gives the sample's own seed.
        pad_token_id: fills rows of a batch; masked, so any token will do. None for the tokenizer's.

    Raises:
        ConfigError: for a number below 1, an empty stop text, or if there is no pad token.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        decoding: Decoding,
        *,
        max_new_tokens: int = 256,
        stop: Sequence[str] = (),
        batch_size: int = 8,
        seed: int = 0,
        pad_token_id: int | None = None,
    ) -> None:
        for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
            if value < 1:
                raise ConfigError(name, value, "is below 1", "choose 1 or more")
        if isinstance(stop, str) or not all(stop):
            raise ConfigError("stop", stop, "is not a list of texts", "give a list of texts that are not empty")
        self.pad_token_id = pad_of(tokenizer) if pad_token_id is None else pad_token_id
        check_inputs(model)
        self.model, self.tokenizer, self.decoding, self.batch_size = model, tokenizer, decoding, batch_size
        self._max_new_tokens, self._stop, self._seed = max_new_tokens, tuple(stop), seed
        self.usage = Usage()

    @torch.no_grad()
    def draw(self, wanted: Sequence[tuple[str, int]]) -> list[Sample]:
        """Samples of prompts, each given as the prompt and the number of the sample, in this order.

        Raises:
            ConfigError: if a prompt has no tokens to start from, or the model has not enough positions.
        """
        # Batches of prompts of similar length have little padding.
        ids = [encode(self.tokenizer, prompt) for prompt, _ in wanted]
        order = sorted(range(len(wanted)), key=lambda index: len(ids[index]))
        samples: dict[int, Sample] = {}
        for first in range(0, len(order), self.batch_size):
            rows = order[first : first + self.batch_size]
            samples.update(zip(rows, self._draw([(*wanted[row], ids[row]) for row in rows]), strict=True))
        return [samples[index] for index in range(len(wanted))]

    def _draw(self, rows: list[tuple[str, int, list[int]]]) -> list[Sample]:
        begun = time.perf_counter()
        length = max(len(ids) for _, _, ids in rows)
        check_positions(self.model, length, self._max_new_tokens)
        padded = [[self.pad_token_id] * (length - len(ids)) + ids for _, _, ids in rows]
        mask = [[0] * (length - len(ids)) + [1] * len(ids) for _, _, ids in rows]
        device = self.model.device
        stopping = StopText(self.tokenizer, self._stop, length) if self._stop else None
        batch = PromptBatch(
            torch.tensor(padded, device=device),
            torch.tensor(mask, device=device),
            tuple(row_seed(self._seed, prompt, number) for prompt, number, _ in rows),
            self._max_new_tokens,
            StoppingCriteriaList([stopping]) if stopping else None,
            self.pad_token_id,
        )
        training = self.model.training
        self.model.eval()
        try:
            new = self.decoding(self.model, batch)[:, length:].tolist()
        finally:
            self.model.train(training)
        samples = [self._sample(*row, tokens) for row, tokens in zip(rows, new, strict=True)]
        self.usage += Usage(
            prompt_tokens=sum(len(ids) for _, _, ids in rows),
            generated_tokens=sum(len(sample.ids) for sample in samples),
            seconds=time.perf_counter() - begun,
            weak_tokens=sum(sample.weak_tokens for sample in samples),
        )
        return samples

    def _sample(self, prompt: str, number: int, prompt_ids: list[int], new: list[int]) -> Sample:
        """A row without what follows its end."""
        ends = end_tokens(self.model, self.tokenizer, self.decoding)
        at = next((place for place, token in enumerate(new) if token in ends), None)
        new = new if at is None else new[: at + 1]
        text, stopped = cut(str(self.tokenizer.decode(new, skip_special_tokens=True)), self._stop)
        if stopped or at is None:
            # What follows the end of a row is padding, which may be the end-of-sequence token.
            while new and (new[-1] == self.pad_token_id or (stopped and new[-1] in ends)):
                new = new[:-1]
        ended = "stop" if stopped else "length" if at is None else "eos"
        # The last token is emitted and not read.
        weak = len(prompt_ids) + max(len(new) - 1, 0) if getattr(self.decoding, "has_weak_pass", False) else 0
        return Sample(prompt, number, text, tuple(prompt_ids), tuple(new), ended, weak)


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokens of a text that is to be continued: with what the tokenizer puts in front, without an end of sequence.

    No text at all is the start of a document: the token of its beginning, or of the end of the one before.

    Raises:
        ConfigError: if there is neither.
    """
    ids = list(tokenizer(text).input_ids)
    while len(ids) > 1 and ids[-1] == tokenizer.eos_token_id and not text.endswith(str(tokenizer.eos_token)):
        ids.pop()
    if ids:
        return ids
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise ConfigError("prompt", text, "has no tokens", "give a text, or a tokenizer with a bos_token or eos_token")
    return [int(start)]  # type: ignore[arg-type]


def pad_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of the pad token.

    Raises:
        ConfigError: if there is none.
    """
    if tokenizer.pad_token_id is None:
        raise ConfigError(
            "tokenizer.pad_token",
            None,
            "is missing, and rows of a batch differ in length",
            "set it (tokenizer.pad_token = tokenizer.eos_token will do, padding is masked) and save the tokenizer",
        )
    return int(tokenizer.pad_token_id)  # type: ignore[arg-type]


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, decoding: Decoding) -> frozenset[int]:
    """The tokens at which `generate` ends a row: of the decoding's config, or else the model's, or else the tokenizer's."""
    own = getattr(getattr(decoding, "config", None), "eos_token_id", None)
    general = None if model.generation_config is None else model.generation_config.eos_token_id
    found = next((ids for ids in (own, general, tokenizer.eos_token_id) if ids is not None), [])
    return frozenset(found if isinstance(found, list) else [found])  # type: ignore[list-item]


def check_positions(model: PreTrainedModel, length: int, more: int = 0) -> None:
    """Check that a sequence of `length` tokens and `more` fits the model.

    Raises:
        ConfigError: if it does not.
    """
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and length + more > positions:
        after = f"with {more} new ones " if more else ""
        raise ConfigError(
            "prompt", f"{length} tokens", f"{after}goes past the model's {positions} positions", "shorten it"
        )


def check_inputs(model: PreTrainedModel) -> None:
    """Check that a model needs nothing but text.

    Raises:
        ConfigError: if its router looks at the task or modality of text, which prompts don't say.
    """
    needs = model.config.spec.router.needs - {"token_ids"} if isinstance(model, MoesaicForCausalLM) else frozenset()
    if needs:
        raise ConfigError(
            "model", type(model).__name__, f"looks at the {min(needs)} of text", "use a model that reads text alone"
        )
