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

# Prints by how many bytes a forward and backward pass raise the memory in use at most, weights not counted, for each
# "experts dtype tokens" of the command line. Each is measured in a fork of its own: imports take seconds.
STEPS = """
import gc
import os
import sys
import torch
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts
import moesaic

torch.set_num_threads(1)
gc.freeze()


def step(experts, dtype, count):
    x = torch.randn(count, 256).to(dtype).requires_grad_()
    index = torch.rand(count, 32).topk(4).indices
    weight = torch.rand(count, 4).to(dtype).requires_grad_()
    experts(x, index, weight).square().sum().backward()
    experts.zero_grad()


def status(field):
    line = next(line for line in open("/proc/self/status") if line.startswith(field))
    return int(line.split()[1]) * 1024


def measure(name, dtype, tokens):
    config = Qwen3MoeConfig(hidden_size=256, moe_intermediate_size=256, num_experts=32, num_experts_per_tok=4)
    config._experts_implementation = name
    experts = Qwen3MoeExperts(config).to(dtype)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    step(experts, dtype, 2)  # loads libraries and starts threads
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = status("VmRSS")
    step(experts, dtype, tokens)
    print(status("VmHWM") - before, flush=True)


for case in sys.argv[1:]:
    name, dtype, tokens = case.split()
    if (fork := os.fork()) == 0:
        measure(name, getattr(torch, dtype), int(tokens))
        os._exit(0)
    os.waitpid(fork, 0)
"""
CASES = [
    (dtype, tokens)
    for dtype in ("float32", "bfloat16")
    for tokens in (64, 4096)  # gradients are most of it, or activations
]


@pytest.fixture(scope="module")
def peaks() -> dict[str, int]:
    """Bytes by experts, dtype and tokens."""
    cases = [f"{name} {dtype} {tokens}" for name in ("moesaic", "eager") for dtype, tokens in CASES]
    # glibc raises its threshold for giving memory back with what was freed before; a second step would then grow nothing.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", STEPS, *cases]
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return dict(zip(cases, map(int, run.stdout.split()), strict=True))


@pytest.mark.parametrize(("dtype", "tokens"), CASES)
def test_a_training_step_takes_no_more_memory_than_transformers_eager(
    peaks: dict[str, int], dtype: str, tokens: int
) -> None:
    native, eager = peaks[f"moesaic {dtype} {tokens}"], peaks[f"eager {dtype} {tokens}"]
    size = 4 if dtype == "float32" else 2
    weights, rows = 32 * 3 * 256 * 256 * size, tokens * 4 * size
    # The packed gradient; rows of the first projection, their gradients and the second projection's input; input, output
    # and their gradients, in float32 as well; 16 MiB for packed blocks and the allocator.
    assert native <= weights + rows * 5 * 256 + tokens * 256 * (8 + 4 * size) + 16 * 2**20
    assert native <= eager
