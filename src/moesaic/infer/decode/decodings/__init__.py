"""Decodings as data, one mechanism a file; each can be handed to `generate` as `custom_generate`."""

from __future__ import annotations

from moesaic.infer.decode.decodings.base import DecodingStrategy
from moesaic.infer.decode.decodings.contrastive import ContrastiveDecoding
from moesaic.infer.decode.decodings.contrastive_search import ContrastiveSearch
from moesaic.infer.decode.decodings.early_exit import EarlyExitContrast
from moesaic.infer.decode.decodings.self_contrast import SelfContrast, SelfContrastRows
from moesaic.infer.decode.decodings.spec import DecodingLike, DecodingSpec

__all__ = [
    "ContrastiveDecoding",
    "ContrastiveSearch",
    "DecodingLike",
    "DecodingSpec",
    "DecodingStrategy",
    "EarlyExitContrast",
    "SelfContrast",
    "SelfContrastRows",
]
