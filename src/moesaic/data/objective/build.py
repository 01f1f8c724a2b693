"""Training batches for an objective, made of batches of packed text."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from moesaic.data.objective.check import check_lengths, lengths_in, room, sentinels_needed
from moesaic.data.objective.config import (
    UL2,
    CausalLM,
    MixedObjective,
    PrefixLM,
    SpanCorruption,
    StagedObjective,
    ul2_of,
)
from moesaic.data.objective.ids import SpecialIds
from moesaic.data.objective.spans import Lengths, corrupt, noise_mask
from moesaic.data.packing import IGNORED_LABEL, Batch

# Tells the numbers drawn here from those of the order of sequences, which has the same seed.
_STREAM = 0x0B7EC


@dataclass(frozen=True)
class Example:
    """One sequence of T places, of which the last may be padding.

    Attributes:
        ids: of the places that are filled.
        predicted: which of them are to be predicted, bool.
        source: place in the packed sequence that each stands for.
    """

    ids: np.ndarray
    predicted: np.ndarray
    source: np.ndarray


class TrainingObjective:
    """Turns batches of packed text into what the model trains on at a step.

    A row of a batch depends on its text and on (seed, step, micro-batch, number of the row in the global batch) alone. So
    training goes on exactly after a resume, without any state, and does not depend on the number of processes.

    Args:
        config: the objective.
        tokenizer: of the text.
        sequence_length: T.
        seed: of the choices.

    Attributes:
        vocabulary: smallest number of ids that a model needs, those of the objective included.

    Raises:
        ConfigError: if the tokenizer has no ids for what the objective needs.
    """

    def __init__(
        self,
        config: CausalLM | UL2 | MixedObjective | StagedObjective,
        tokenizer: PreTrainedTokenizerBase,
        sequence_length: int,
        seed: int = 0,
    ) -> None:
        check_lengths(config, sequence_length)
        self.config, self.sequence_length, self.seed = config, sequence_length, seed
        pad = tokenizer.pad_token_id
        self._ids: dict[UL2, SpecialIds] = {}
        for path, found in ul2_of(config).items():
            where = ".".join(filter(None, ("data.objective", path)))
            self._ids[found] = SpecialIds.of(found, sentinels_needed(found, sequence_length), tokenizer, where)
        self.vocabulary = max([len(tokenizer), *(ids.limit for ids in self._ids.values())])
        self._fill = pad if isinstance(pad, int) else tokenizer.eos_token_id
        self._lengths: dict[SpanCorruption, Lengths] = {
            denoiser: lengths_in(denoiser, sequence_length)
            for found in self._ids
            for denoiser in found.denoisers
            if isinstance(denoiser, SpanCorruption)
        }

    def at(self, step: int, steps: int) -> CausalLM | UL2 | MixedObjective:
        """The objective of a step, of those that come one after the other.

        Args:
            step: optimiser steps already made.
            steps: of the whole run.
        """
        return self.config.at(step, steps) if isinstance(self.config, StagedObjective) else self.config

    def begins(self, step: int, steps: int) -> str | None:
        """The kind of the objective that begins after `step` steps, if it is another than before."""
        now, before = self.at(step, steps), self.at(step - 1, steps) if step else None
        return now.type if before is not None and now != before else None

    def batch(self, batch: Batch, *, step: int, steps: int, micro_batch: int = 0, first_row: int = 0) -> Batch:
        """The batch that the model trains on; a batch for causal language modelling is returned as it is.

        With a UL2 mixture in the objective there is an `attention_mask` (B, T), 0 in padding, which comes last.

        Args:
            batch: (B, T) rows of packed text.
            step: optimiser steps already made.
            steps: of the whole run.
            micro_batch: number of the batch within its step.
            first_row: number of the first row in the global batch, of which other processes hold other rows.
        """
        objective = self.at(step, steps)
        if isinstance(objective, CausalLM):
            return batch
        tokens_BT = batch["input_ids"].numpy()
        rows = []
        for row, tokens in enumerate(tokens_BT):
            rng = np.random.default_rng([self.seed, _STREAM, step, micro_batch, first_row + row])
            rows.append(self._example(objective, tokens, rng))
        ids_BT = np.full_like(tokens_BT, self._fill)
        labels_BT = np.full_like(tokens_BT, IGNORED_LABEL)
        source_BT, real_BT = np.zeros_like(tokens_BT), np.zeros_like(tokens_BT)
        for row, example in enumerate(rows):
            count = len(example.ids)
            ids_BT[row, :count], real_BT[row, :count] = example.ids, 1
            labels_BT[row, :count] = np.where(example.predicted, example.ids, IGNORED_LABEL)
            source_BT[row, :count], source_BT[row, count:] = example.source, example.source[-1]
        source, real = torch.from_numpy(source_BT), torch.from_numpy(real_BT)
        filled = Batch(**batch)
        filled["input_ids"], filled["labels"] = torch.from_numpy(ids_BT), torch.from_numpy(labels_BT)
        filled["attention_mask"] = real
        for name in ("document_ids", "domain_ids"):
            filled[name] = batch[name].gather(1, source).masked_fill(real == 0, -1)
        if (modality := batch.get("modality_ids")) is not None:
            filled["modality_ids"] = modality.gather(1, source)
        return filled

    def _example(
        self, objective: CausalLM | UL2 | MixedObjective, tokens: np.ndarray, rng: np.random.Generator
    ) -> Example:
        if isinstance(objective, MixedObjective):
            index = _drawn([part.share for part in objective.parts], rng)
            return self._example(objective.parts[index].objective, tokens, rng)
        if isinstance(objective, CausalLM):
            # Models shift labels, so that the first is never predicted.
            return Example(tokens, np.ones(len(tokens), dtype=bool), np.arange(len(tokens)))
        denoiser = objective.denoisers[_drawn([found.share for found in objective.denoisers], rng)]
        ids = self._ids[objective]
        if isinstance(denoiser, PrefixLM):
            example = _prefix_lm(tokens[: room(denoiser, len(tokens))], rng)
        else:
            example = self._span_corruption(denoiser, ids, tokens, rng)
        return example if denoiser.mode is None else _with_mode(example, ids.modes[denoiser.mode])

    def _span_corruption(
        self, denoiser: SpanCorruption, ids: SpecialIds, tokens: np.ndarray, rng: np.random.Generator
    ) -> Example:
        lengths = self._lengths[denoiser]
        # Another part of the text each time: it is longer than what fits with its sentinels.
        start = int(rng.integers(len(tokens) - lengths.tokens + 1))
        text = tokens[start : start + lengths.tokens]
        found = corrupt(text, noise_mask(lengths, rng), ids.sentinels, ids.end)
        return Example(
            np.concatenate([found.inputs, found.targets]),
            np.arange(len(found.inputs) + len(found.targets)) >= len(found.inputs),
            start + np.concatenate([found.input_source, found.target_source]),
        )


def _prefix_lm(tokens: np.ndarray, rng: np.random.Generator) -> Example:
    place = np.arange(len(tokens))
    return Example(tokens, place >= rng.integers(1, len(tokens)), place)


def _with_mode(example: Example, mode: int) -> Example:
    return Example(
        np.concatenate([[mode], example.ids]),
        np.concatenate([[False], example.predicted]),
        np.concatenate([example.source[:1], example.source]),
    )


def _drawn(shares: list[float], rng: np.random.Generator) -> int:
    """An index, each as likely as its share."""
    total = np.cumsum(shares)
    return int(np.searchsorted(total, rng.random() * total[-1], side="right"))
