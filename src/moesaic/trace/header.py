"""`TraceHeader`: what a trace says of itself, and whether it fits a model or another trace."""

from __future__ import annotations

import hashlib
from typing import Any

from pydantic import Field, NonNegativeInt, PositiveInt

from moesaic.configuration import Config

VERSION = 1
"""Version of the trace format; see docs/contracts/trace.md."""


class LayerFacts(Config):
    """One MoE layer.

    Attributes:
        num_experts: N, the experts that compute something.
        top_k: K, the most selections of a token.
        num_null: null experts, whose numbers follow those of the experts.
        router: kind of router.
        selects: whether tokens select experts. False for soft slots and merged experts, of which a trace has no rows.
    """

    num_experts: PositiveInt
    top_k: PositiveInt
    num_null: NonNegativeInt = 0
    router: str = ""
    selects: bool = True

    @property
    def num_columns(self) -> int:
        """M: experts and null experts."""
        return self.num_experts + self.num_null


class TraceHeader(Config):
    """What was traced.

    Attributes:
        version: of the format.
        model: name or folder of the model.
        model_type: its model type in transformers.
        vocab_size: of the model; 0 if not known.
        tokenizer: `tokenizer_fingerprint` of the tokenizer that made the ids; empty if not known.
        layers: MoE layers by the index of their decoder layer.
        domains: names of the domains, by number; the first is "", for what no domain was named for.
        sample: share of the documents that were recorded.
        has_scores: whether rows hold the scores of all columns.
        moesaic: version of moesaic that recorded it.
    """

    version: PositiveInt = VERSION
    model: str = ""
    model_type: str = ""
    vocab_size: NonNegativeInt = 0
    tokenizer: str = ""
    layers: dict[int, LayerFacts]
    domains: tuple[str, ...] = ("",)
    sample: float = Field(default=1.0, gt=0, le=1)
    has_scores: bool = False
    moesaic: str = ""


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Sixteen hexadecimal digits that tell vocabularies apart: equal for tokenizers with the same token for each id."""
    vocabulary = sorted((index, token) for token, index in tokenizer.get_vocab().items())
    return hashlib.sha256(repr(vocabulary).encode()).hexdigest()[:16]
