"""Peak memory of a training step on the native CPU kernel, beside transformers' own experts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from moesaic.layer.kernels.native import library

pytestmark = [
    pytest.mark.skipif(library.load() is None, reason="native kernels were not built: no C compiler"),
    pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc"),
]

# Prints by how many bytes a forward and backward pass raise the memory in use at most, weights not counted.
STEP = """
import sys
import torch
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts
import moesaic

name, dtype, tokens = sys.argv[1], getattr(torch, sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(1)
config = Qwen3MoeConfig(hidden_size=256, moe_intermediate_size=256, num_experts=32, num_experts_per_tok=4)
config._experts_implementation = name
experts = Qwen3MoeExperts(config).to(dtype)
for parameter in experts.parameters():
    torch.nn.init.normal_(parameter, std=0.02)


def step(count):
    x = torch.randn(count, 256).to(dtype).requires_grad_()
    index = torch.rand(count, 32).topk(4).indices
    weight = torch.rand(count, 4).to(dtype).requires_grad_()
    experts(x, index, weight).square().sum().backward()
    experts.zero_grad()


def status(field):
    line = next(line for line in open("/proc/self/status") if line.startswith(field))
    return int(line.split()[1]) * 1024


step(2)  # loads libraries and starts threads
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
before = status("VmRSS")
step(tokens)
print(status("VmHWM") - before)
"""


def peak(name: str, dtype: str, tokens: int) -> int:
    command = [sys.executable, "-c", STEP, name, dtype, str(tokens)]
    # glibc raises its threshold for giving memory back with what was freed before; a second step would then grow nothing.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return int(run.stdout)


@pytest.mark.parametrize("tokens", [64, 4096])  # gradients are most of it, or activations
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_training_step_takes_no_more_memory_than_transformers_eager(dtype: str, tokens: int) -> None:
    native, eager = peak("moesaic", dtype, tokens), peak("eager", dtype, tokens)
    size = 4 if dtype == "float32" else 2
    weights, rows = 32 * 3 * 256 * 256 * size, tokens * 4 * size
    # The packed gradient; rows of the first projection, their gradients and the second projection's input; input, output
    # and their gradients, in float32 as well; 16 MiB for packed blocks and the allocator.
    assert native <= weights + rows * 5 * 256 + tokens * 256 * (8 + 4 * size) + 16 * 2**20
    assert native <= eager
