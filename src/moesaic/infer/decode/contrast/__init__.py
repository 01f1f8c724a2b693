"""Decoding by the difference of two next-token distributions."""

from __future__ import annotations

from moesaic.infer.decode.contrast.early_exit import Divergence, EarlyExit, distance
from moesaic.infer.decode.contrast.lookahead import Lookahead, LookaheadProcessor
from moesaic.infer.decode.contrast.passes import Passes
from moesaic.infer.decode.contrast.processor import ContrastProcessor, EndedRows, EosBan, Strength, with_contrast
from moesaic.infer.decode.contrast.scores import contrast, difference, plausible
from moesaic.infer.decode.contrast.two_models import TwoModels, check_vocabularies
from moesaic.infer.decode.contrast.two_passes import TwoPasses
from moesaic.infer.decode.contrast.two_rows import TwoRows

__all__ = [
    "ContrastProcessor",
    "Divergence",
    "EarlyExit",
    "EndedRows",
    "EosBan",
    "Lookahead",
    "LookaheadProcessor",
    "Passes",
    "Strength",
    "TwoModels",
    "TwoPasses",
    "TwoRows",
    "check_vocabularies",
    "contrast",
    "difference",
    "distance",
    "plausible",
    "with_contrast",
]
