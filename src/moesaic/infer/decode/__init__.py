"""Decoding: computing it natively, and with another routing than the model's own."""

from __future__ import annotations

from moesaic.infer.decode.cost import Work, pass_bytes
from moesaic.infer.decode.counting import count_work
from moesaic.infer.decode.decodings import (
    ContrastiveDecoding,
    ContrastiveSearch,
    DecodingLike,
    DecodingSpec,
    DecodingStrategy,
    EarlyExitContrast,
    SelfContrast,
    SelfContrastRows,
)
from moesaic.infer.decode.fast import FastDecoding, fast_decoding
from moesaic.infer.decode.overrides import OverrideLike, OverrideSpec, ReplayedTrace, check_override, override_routing
from moesaic.infer.decode.positions import Positions, count_positions

__all__ = [
    "ContrastiveDecoding",
    "ContrastiveSearch",
    "DecodingLike",
    "DecodingSpec",
    "DecodingStrategy",
    "EarlyExitContrast",
    "FastDecoding",
    "OverrideLike",
    "OverrideSpec",
    "Positions",
    "ReplayedTrace",
    "SelfContrast",
    "SelfContrastRows",
    "Work",
    "check_override",
    "count_positions",
    "count_work",
    "fast_decoding",
    "override_routing",
    "pass_bytes",
]
