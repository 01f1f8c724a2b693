"""What training sequences ask the model to predict: the next token, or what a denoiser hid (UL2)."""

from __future__ import annotations

from moesaic.data.objective.config import (
    MODES,
    UL2,
    CausalLM,
    MixedObjective,
    ObjectiveConfig,
    ObjectivePart,
    PrefixLM,
    SpanCorruption,
    Stage,
    StagedObjective,
)

__all__ = [
    "MODES",
    "UL2",
    "CausalLM",
    "MixedObjective",
    "ObjectiveConfig",
    "ObjectivePart",
    "PrefixLM",
    "SpanCorruption",
    "Stage",
    "StagedObjective",
]
