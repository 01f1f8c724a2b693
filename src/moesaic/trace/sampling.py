"""Which documents a trace records: whole ones, the same in every run."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from moesaic.errors import ConfigError


def check_sample(sample: float) -> None:
    """Check a share of the documents.

    Raises:
        ConfigError: if it is not above 0 and at most 1.
    """
    if not 0 < sample <= 1:
        raise ConfigError("sample", sample, "is not a share of the documents", "choose above 0 and up to 1")


def sampled(document_T: Tensor, sample: float, seed: int = 0) -> Tensor | None:
    """Which tokens belong to a document that is recorded, bool (T,); None where all do.

    A document is in by a hash of its number and the seed, so that a larger share holds all documents of a smaller one.

    Args:
        document_T: numbers of the documents, int64.
        sample: share of the documents.
        seed: draws another share.
    """
    if sample >= 1:
        return None
    # Splitmix64: the n-th number of the sequence that starts at the seed.
    with np.errstate(over="ignore"):
        start = np.uint64(seed % 2**64) * np.uint64(0xD1342543DE82EF95)
        x = (document_T.numpy().astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) + start
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x ^= x >> np.uint64(31)
    return torch.from_numpy((x >> np.uint64(11)).astype(np.float64) < sample * 2.0**53)
