"""One thread for all tests: models are tiny, and threads that wait for each other cost more than they compute."""

from __future__ import annotations

import gc
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # also for the processes that tests start

import torch
from hypothesis import settings

torch.set_num_threads(1)
# How long an example takes says how busy the machine is.
settings.register_profile("any_machine", deadline=None)
settings.load_profile("any_machine")
if not torch.cuda.is_available():
    # Triton kernels run in its interpreter, which must be known before anybody imports Triton.
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_finish() -> None:
    """Collect garbage less often, and never look through modules and tests: it takes a tenth of the time otherwise."""
    gc.freeze()
    gc.set_threshold(10_000, 20, 50)


def pytest_unconfigure() -> None:
    gc.unfreeze()  # what is frozen is not taken down at the end, which libraries report as leaks
