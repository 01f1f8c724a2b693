"""What the fork server of `run_ranks` imports once."""

from __future__ import annotations

import gc
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: F401
import torch
import torch.distributed
import torch.distributed.checkpoint
import torch.distributed.fsdp
import transformers.models.llama.modeling_llama  # noqa: F401

import moesaic
import moesaic.train  # noqa: F401

torch.set_num_threads(1)
gc.freeze()  # a collection in a fork would write to, and so copy, the memory of all modules
