"""Compile every Triton kernel for a GPU that need not be there, and print what each one uses, a JSON line a kernel.

    python -m tests.layer.kernels.compile_triton --capability 90 --dtype bfloat16 --rows 128

Run without TRITON_INTERPRET, which would keep Triton from compiling. Triton's own compiler and assembler do the work, as
on a GPU; only the launch is left out.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from moesaic.layer.kernels import ExpertWeights, FusedActivation
from moesaic.layer.kernels.triton import decode, tiles
from moesaic.layer.kernels.triton.run import run_triton

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
GATED = FusedActivation("silu", gated=True)
FORMULAS = {
    "gated": GATED,
    "interleaved": FusedActivation("clamped_swiglu", True, True, 1.702, 7.0),
    "plain": FusedActivation("gelu", gated=False),
}


class _Driver:
    """What Triton asks of a driver in order to compile."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def record_kernels(capability: int) -> list[Any]:
    """Let launches only compile; the list gets each compiled kernel."""
    compiled: list[Any] = []
    triton.runtime.driver.set_active(_Driver(capability))

    def launcher(function: Any, grid: Any) -> Any:
        def launch(*args: Any, **kwargs: Any) -> None:
            kernel = function.run(*args, grid=grid, warmup=True, **kwargs)
            if all(kernel is not known for known in compiled):
                compiled.append(kernel)

        return launch

    JITFunction.__getitem__ = launcher  # type: ignore[method-assign]
    limit = tiles.SHARED_MEMORY[divmod(capability, 10)]
    tiles.shared_memory = lambda device: limit
    return compiled


def resources(kernel: Any) -> dict[str, Any]:
    """Shared memory in bytes, registers of a thread, and bytes of stack that spilled registers take."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        text = subprocess.run(
            [CUOBJDUMP, "--dump-resource-usage", cubin.name], capture_output=True, text=True, check=True
        ).stdout
    registers, stack = (int(re.findall(rf"{name}:(\d+)", text)[-1]) for name in ("REG", "STACK"))
    metadata = kernel.metadata
    return {
        "kernel": metadata.name,
        "shared": metadata.shared,
        "registers": registers,
        "stack": stack,
        "warps": metadata.num_warps,
        "stages": metadata.num_stages,
        "wgmma": "wgmma" in kernel.asm["ptx"],
        "mma": "mma.sync" in kernel.asm["ptx"],
        "async_copies": kernel.asm["ptx"].count("cp.async."),
    }


def run(
    fused: FusedActivation, dtype: torch.dtype, rows_per_expert: int, *, bias: bool, transposed: bool, hidden: int
) -> None:
    """Forward and backward at sizes that divide by every tile, or not, as `hidden` does."""
    experts, width, top_k = 2, hidden // 2, 2
    up_width = 2 * width if fused.gated else width
    sizes = (experts, up_width, hidden), (experts, hidden, width)
    if transposed:
        up, down = (torch.empty(n, i, o, dtype=dtype).transpose(1, 2) for n, o, i in sizes)
    else:
        up, down = (torch.empty(size, dtype=dtype) for size in sizes)
    biases = [torch.empty(size[:2], dtype=dtype) if bias else None for size in sizes]
    leaves = [leaf.requires_grad_() for leaf in (up, down, *biases) if leaf is not None]
    weights = ExpertWeights(up, down, fused, *biases, fused=fused)
    tokens = max(1, rows_per_expert * experts // top_k)
    x_TD = torch.empty(tokens, hidden, dtype=dtype, requires_grad=True)
    index_TK = torch.zeros(tokens, top_k, dtype=torch.int64)
    combine_TK = torch.ones(tokens, top_k)
    y_TD = run_triton(weights, x_TD, index_TK, combine_TK, atomic=False)
    torch.autograd.grad(y_TD.sum(), [x_TD, *leaves])
    with torch.no_grad():
        run_triton(weights, x_TD, index_TK, combine_TK, atomic=True)
        few = decode.MAX_PICKS // top_k
        run_triton(weights, x_TD[:few], index_TK[:few], combine_TK[:few], atomic=False)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--capability", type=int, default=90)
    parser.add_argument("--dtype", default="bfloat16", help="of torch, or tf32 for float32 on tensor cores")
    parser.add_argument("--rows", type=int, default=128, help="rows per expert")
    parser.add_argument("--formula", choices=FORMULAS, default="gated")
    parser.add_argument("--bias", action="store_true")
    parser.add_argument("--transposed", action="store_true")
    parser.add_argument("--hidden", type=int, default=2048)
    args = parser.parse_args()
    compiled = record_kernels(args.capability)
    torch.backends.cuda.matmul.allow_tf32 = args.dtype == "tf32"
    run(
        FORMULAS[args.formula],
        torch.float32 if args.dtype == "tf32" else getattr(torch, args.dtype),
        args.rows,
        bias=args.bias,
        transposed=args.transposed,
        hidden=args.hidden,
    )
    for kernel in compiled:
        print(json.dumps(resources(kernel)))


if __name__ == "__main__":
    main()
