"""Random numbers of training: each step seeds all generators anew, from the seed of the run, the step and the rank.

So no generator state is saved: a run that goes on from a checkpoint draws what it would have drawn, also with another
number of processes, except that which process draws what follows the number of processes. NumPy's global generator is
among them: moesaic does not use it, but a custom router or data source may.
"""

from __future__ import annotations

import random

import numpy as np
import torch


def seed_all(seed: int) -> None:
    """Seed torch (all devices), Python and NumPy."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed all generators for the step that follows `step` others; other steps and ranks get unrelated numbers.

    Args:
        seed: of the run, from 0.
        step: optimiser steps made.
        rank: of this process.
    """
    seed_all(int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> 1))
