"""Token ids as text."""

from __future__ import annotations

from typing import Any

from moesaic.trace.rows import NOTHING

_VISIBLE = str.maketrans({" ": "␣", "\n": "⏎", "\t": "⇥", "\r": "␍"})


class TokenNames:
    """Text of token ids, each decoded once.

    Args:
        tokenizer: of transformers; without one, ids are shown.

    Attributes:
        special: ids of padding, begin and end of text and the like.
    """

    def __init__(self, tokenizer: Any = None) -> None:
        self._tokenizer = tokenizer
        self._texts: dict[int, str] = {}
        self.special: frozenset[int] = frozenset(getattr(tokenizer, "all_special_ids", ()))

    def text(self, token_id: int) -> str:
        """As it stands in the text."""
        if token_id not in self._texts:
            self._texts[token_id] = self._decode(token_id)
        return self._texts[token_id]

    def visible(self, token_id: int) -> str:
        """With signs for blanks, tabs and line ends."""
        return self.text(token_id).translate(_VISIBLE)

    def _decode(self, token_id: int) -> str:
        if token_id == NOTHING:
            return "(embedding)"
        if self._tokenizer is None:
            return str(token_id)
        text = self._tokenizer.decode([token_id], skip_special_tokens=False)
        if not text or "\ufffd" in text:
            # Part of a character; the vocabulary's own spelling at least tells such tokens apart.
            return str(self._tokenizer.convert_ids_to_tokens(token_id))
        return text
