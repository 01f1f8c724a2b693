"""Several samples of a prompt: answers found in them, votes over answers, the best of them."""

from __future__ import annotations

from moesaic.infer.consistency.best_of import Best, Scorer, best_of
from moesaic.infer.consistency.decoding import Decoding, Generate, PromptBatch
from moesaic.infer.consistency.extract import (
    Extractor,
    after_marker,
    by_function,
    by_pattern,
    by_preset,
    choice_letter,
    last_number,
    whole,
)
from moesaic.infer.consistency.likelihood import (
    Continuation,
    likelihood_weights,
    log_likelihoods,
    mean_log_probability,
)
from moesaic.infer.consistency.normalise import normalise_letter, normalise_number, normalise_text
from moesaic.infer.consistency.sample import Sample, Sampler, Usage
from moesaic.infer.consistency.self_consistency import Consensus, self_consistency
from moesaic.infer.consistency.spec_decoding import SpecDecoding
from moesaic.infer.consistency.vote import Vote, decided, vote
from moesaic.infer.decode.row_sampler import RowSampler, row_seed

__all__ = [
    "Best",
    "Consensus",
    "Continuation",
    "Decoding",
    "Extractor",
    "Generate",
    "PromptBatch",
    "RowSampler",
    "Sample",
    "Sampler",
    "Scorer",
    "SpecDecoding",
    "Usage",
    "Vote",
    "after_marker",
    "best_of",
    "by_function",
    "by_pattern",
    "by_preset",
    "choice_letter",
    "decided",
    "last_number",
    "likelihood_weights",
    "log_likelihoods",
    "mean_log_probability",
    "normalise_letter",
    "normalise_number",
    "normalise_text",
    "row_seed",
    "self_consistency",
    "vote",
    "whole",
]
