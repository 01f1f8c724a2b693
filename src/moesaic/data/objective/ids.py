"""Ids of sentinels and mode tokens: from the tokenizer's vocabulary, or from a block of ids that it leaves free."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from moesaic.data.objective.config import UL2
from moesaic.data.tokenizer import end_of_text, vocabulary_limit
from moesaic.errors import ConfigError


@dataclass(frozen=True)
class SpecialIds:
    """Ids that an objective puts between those of text.

    Attributes:
        sentinels: in their order, int64.
        modes: by name.
        end: of the end of text.
    """

    sentinels: np.ndarray
    modes: dict[str, int]
    end: int

    @property
    def limit(self) -> int:
        """One more than the largest of them."""
        return 1 + max([self.end, *self.sentinels.tolist(), *self.modes.values()])

    @classmethod
    def of(cls, config: UL2, sentinels: int, tokenizer: PreTrainedTokenizerBase, where: str) -> SpecialIds:
        """Find the ids for so many sentinels.

        Args:
            config: names, or where the reserved block begins.
            sentinels: how many are needed.
            tokenizer: of the text.
            where: path of the field, for errors.

        Raises:
            ConfigError: if the tokenizer lacks a name, or uses the reserved ids itself.
        """
        end = end_of_text(tokenizer)
        if config.reserved_from is None:
            return cls.named(config, sentinels, tokenizer, end, where)
        taken = vocabulary_limit(tokenizer)
        if config.reserved_from < taken:
            raise ConfigError(
                f"{where}.reserved_from",
                config.reserved_from,
                f"is an id of the tokenizer, whose ids end at {taken - 1}",
                f"choose {taken} or more",
            )
        first = config.reserved_from + len(config.modes)
        modes = {name: config.reserved_from + index for index, name in enumerate(config.modes)}
        return cls(np.arange(first, first + sentinels), modes, end)

    @classmethod
    def named(cls, config: UL2, sentinels: int, tokenizer: PreTrainedTokenizerBase, end: int, where: str) -> SpecialIds:
        """Ids by their names in the tokenizer."""
        known = tokenizer.get_vocab()
        names = [config.sentinel.format(number) for number in range(sentinels)]
        missing = [name for name in (*names, *config.modes) if name not in known]
        if missing:
            raise ConfigError(
                where,
                config.type,
                f"needs {len(names)} sentinels and {len(config.modes)} mode tokens, and the tokenizer has no "
                f"{missing[0]} ({len(missing)} are missing)",
                f"set data.tokenizer.sentinels to {sentinels} for a tokenizer that is trained, or {where}.reserved_from to "
                f"{vocabulary_limit(tokenizer)}",
            )
        modes = {name: known[name] for name in config.modes}
        return cls(np.array([known[name] for name in names], dtype=np.int64), modes, end)
