"""Every Triton kernel compiles for GPUs that need not be here, fits them, uses tensor cores and keeps loads in flight."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs Triton, which is not installed"
)

PRODUCTS = {"_gather_linear", "_linear_scatter", "_hidden_gradient", "_weight_gradient"}
DECODE = {"_decode_up", "_decode_down"}
SHARED_MEMORY = {80: 166912, 86: 101376, 89: 101376, 90: 232448}
# Bytes of a thread's registers that may be spilled around the activation, once a tile; more would show in the loop.
SPILLED = 512


def compile_all(tmp_path: Path, capability: int, dtype: str, rows: int, *options: str) -> list[dict[str, Any]]:
    """What each kernel uses; in a process of its own, because here Triton interprets."""
    command = [sys.executable, "-m", "tests.layer.kernels.compile_triton", "--capability", str(capability)]
    command += ["--dtype", dtype, "--rows", str(rows), *options]
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


def check(kernels: list[dict[str, Any]], capability: int, dtype: str, rows: int) -> None:
    assert {kernel["kernel"] for kernel in kernels} >= PRODUCTS | DECODE | {"_sum_picks"}
    for kernel in kernels:
        assert kernel["shared"] <= SHARED_MEMORY[capability], kernel
        assert kernel["stack"] <= SPILLED, kernel
        if kernel["kernel"] in PRODUCTS | DECODE:
            assert kernel["async_copies"], kernel
        if kernel["kernel"] in PRODUCTS and dtype != "float32":
            assert kernel["wgmma"] or kernel["mma"], kernel
            assert kernel["wgmma"] or capability < 90 or rows < 64 or dtype == "tf32", kernel


@pytest.mark.parametrize(
    ("capability", "dtype", "rows", "options"),
    [
        (90, "bfloat16", 256, []),
        (80, "float16", 16, ["--formula", "interleaved", "--bias", "--transposed", "--hidden", "224"]),
    ],
    ids=["SM90", "SM80"],
)
def test_compiles(capability: int, dtype: str, rows: int, options: list[str], tmp_path: Path) -> None:
    check(compile_all(tmp_path, capability, dtype, rows, *options), capability, dtype, rows)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [[], ["--formula", "plain", "--bias"], ["--formula", "interleaved", "--transposed"]]
)
@pytest.mark.parametrize("rows", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "tf32"])
@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_compiles_for_every_row_of_the_table(
    capability: int, dtype: str, rows: int, options: list[str], tmp_path: Path
) -> None:
    check(compile_all(tmp_path, capability, dtype, rows, *options), capability, dtype, rows)
