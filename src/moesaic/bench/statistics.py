"""Medians and spreads of few samples."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def median(samples: Sequence[float]) -> float:
    """The middle sample, or the mean of the middle two."""
    return float(np.median(samples))


def spread(samples: Sequence[float]) -> float:
    """Interquartile range: the distance that the middle half of the samples spans, interpolated; 0 for one sample."""
    low, high = np.percentile(samples, [25, 75])
    return float(high - low)
