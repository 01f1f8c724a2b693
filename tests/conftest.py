"""One thread for all tests: models are tiny, and threads that wait for each other cost more than they compute."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # also for the processes that tests start

import torch

torch.set_num_threads(1)
if not torch.cuda.is_available():
    # Triton kernels run in its interpreter, which must be known before anybody imports Triton.
    os.environ.setdefault("TRITON_INTERPRET", "1")
