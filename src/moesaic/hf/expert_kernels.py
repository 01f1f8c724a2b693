"""transformers' own experts functions as kernels of our registry, so that one name chooses among all there are.

They run on the same tensors: a view in transformers' terms is made from `ExpertWeights`, and no weight is copied to
make it. ("batched_mm" itself gathers a copy of an expert's weights for each pick.)

Where "auto" takes them on a GPU is taken from transformers' measurements, not from ours: its page "Experts backends"
has, for 16 tokens decoded at batch size 1, 535 ms for batched_mm and 815 ms for grouped_mm against 1,194 ms for eager,
and at longer input 36 GB against 27 GB of memory for batched_mm. Its `generate` decodes with batched_mm and prefills
with grouped_mm on every device but the CPU. On the CPU "auto" takes none of them: `native` is faster at all sizes that
were measured, and `grouped` is what it falls back to.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from moesaic.hf.compat import experts_function, missing_for_experts_function
from moesaic.layer.kernels import KERNELS, Case, ExpertWeights, Kernel

# Implementations that were seen to skip picks of no expert, forward and backward (tests/hf/test_no_expert.py). Those of
# transformers know such picks from expert parallelism only. "deepgemm" and "sonicmoe" say that they skip them too, but
# need a GPU and kernels from the hub, and nobody has run them with such picks here.
SKIP_NO_EXPERT = frozenset({"grouped_mm", "batched_mm"})

# torch.nn.functional.grouped_mm and the kernels from the hub address rows in steps of this many bytes.
_ALIGNMENT = 16
# At most so many picks gather their weights: more would cost more memory than the layer itself.
_MOST_GATHERED = 64


@dataclass(frozen=True)
class _Config:
    hidden_act: str | None


@dataclass(frozen=True, eq=False)
class _Module:
    """What an experts function of transformers reads of its module."""

    num_experts: int
    has_gate: bool
    has_bias: bool
    is_transposed: bool
    is_concatenated: bool
    has_post_expert_norm: bool
    _is_expert_parallel: bool
    _apply_gate: Callable[[Tensor], Tensor]
    act_fn: Callable[[Tensor], Tensor]
    config: _Config
    gate_up_proj: Tensor
    up_proj: Tensor
    down_proj: Tensor
    gate_up_proj_bias: Tensor | None
    up_proj_bias: Tensor | None
    down_proj_bias: Tensor | None

    @classmethod
    def of(cls, weights: ExpertWeights, *, may_skip: bool) -> _Module:
        up, down, fused = weights.up_NHD, weights.down_NDF, weights.fused
        transposed = up.stride(2) != 1
        if transposed:
            up, down = up.transpose(1, 2), down.transpose(1, 2)
        return cls(
            num_experts=weights.num_experts,
            has_gate=weights.up_NHD.shape[1] != weights.down_NDF.shape[2],
            has_bias=weights.up_bias_NH is not None,
            is_transposed=transposed,
            is_concatenated=fused is None or not fused.interleaved,
            has_post_expert_norm=False,
            _is_expert_parallel=may_skip,
            _apply_gate=weights.activate,
            act_fn=weights.activate,
            config=_Config(hidden_act=None if fused is None else fused.name),
            gate_up_proj=up,
            up_proj=up,
            down_proj=down,
            gate_up_proj_bias=weights.up_bias_NH,
            up_proj_bias=weights.up_bias_NH,
            down_proj_bias=weights.down_bias_ND,
        )


def _run(
    weights: ExpertWeights, x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor, *, name: str, may_skip: bool
) -> Tensor:
    if may_skip and name == "batched_mm":
        # It computes such picks with the last expert and weight zero. A row that isn't finite would come through.
        x_TD = x_TD.masked_fill((index_TK == weights.num_experts).all(-1, keepdim=True), 0.0)
    return experts_function(name)(_Module.of(weights, may_skip=may_skip), x_TD, index_TK, weight_TK).to(x_TD.dtype)


def _one_dtype(case: Case, known: tuple[torch.dtype, ...]) -> str | None:
    if case.dtype != case.weight_dtype:
        return f"needs input and weights of one dtype, got {case.dtype} and {case.weight_dtype}"
    if case.dtype not in known:
        return f"needs {' or '.join(str(dtype) for dtype in known)}, got {case.dtype}"
    if case.autocast not in (None, case.dtype):
        return f"does not follow autocast from {case.dtype} to {case.autocast}"
    return None


def _aligned(case: Case) -> str | None:
    size = case.dtype.itemsize
    for letter, value in (("D", case.hidden), ("F", case.width)):
        if value * size % _ALIGNMENT:
            return f"needs rows of whole {_ALIGNMENT} bytes, got {letter} = {value} in {case.dtype}"
    return None


def _grouped_mm_refuses(case: Case) -> str | None:
    return _one_dtype(case, (torch.bfloat16, torch.float16, torch.float32)) or _aligned(case)


def _grouped_mm_suits(case: Case) -> str | None:
    # In other dtypes, and on older cards, torch multiplies one expert after the other.
    if case.device == "cuda" and case.capability >= (8, 0) and case.dtype == torch.bfloat16:
        return "torch's grouped GEMM, which does not wait for the GPU; not measured by moesaic"
    return None


def _batched_mm_refuses(case: Case) -> str | None:
    if case.dtype != case.weight_dtype:
        return f"needs input and weights of one dtype, got {case.dtype} and {case.weight_dtype}"
    if not case.dtype.is_floating_point:
        return f"needs floating point, got {case.dtype}"
    return None


def _batched_mm_suits(case: Case) -> str | None:
    if case.device == "cuda" and not case.needs_grad and case.rows <= min(_MOST_GATHERED, case.experts):
        return "few picks: one batched product over their gathered weights; not measured by moesaic"
    return None


def _sonicmoe_refuses(case: Case) -> str | None:
    if case.device != "cuda":
        return f"needs a CUDA device, got {case.device}"
    fused = case.fused
    # transformers also sends "gelu" there, but which of the two it computes is not known here.
    if fused is None or not fused.gated or fused.name not in ("silu", "relu"):
        return "computes only experts gated by silu or relu"
    reason = _one_dtype(case, (torch.bfloat16, torch.float16)) or _aligned(case)
    return reason or missing_for_experts_function("sonicmoe")


def _deepgemm_refuses(case: Case) -> str | None:
    if case.device != "cuda":
        return f"needs a CUDA device, got {case.device}"
    if case.needs_grad:
        return "has no backward pass"
    return _one_dtype(case, (torch.bfloat16,)) or _aligned(case) or missing_for_experts_function("deepgemm")


def _by_name_only(case: Case) -> None:
    """It downloads code from the hub when it first runs, which nobody should get without asking."""


def _kernels(*, may_skip: bool) -> tuple[Kernel, ...]:
    theirs = tuple(
        Kernel(
            name,
            partial(_run, name=name, may_skip=may_skip),
            refuses,
            suits,
            skips_no_expert=name in SKIP_NO_EXPERT,
        )
        for name, refuses, suits in (
            ("batched_mm", _batched_mm_refuses, _batched_mm_suits),
            ("grouped_mm", _grouped_mm_refuses, _grouped_mm_suits),
            ("sonicmoe", _sonicmoe_refuses, _by_name_only),
            ("deepgemm", _deepgemm_refuses, _by_name_only),
        )
    )
    # Before ours for GPUs, which no GPU has run yet; others have measured theirs.
    first_on_gpu = next(place for place, kernel in enumerate(KERNELS) if kernel.name == "triton")
    return (*KERNELS[:first_on_gpu], *theirs, *KERNELS[first_on_gpu:])


_WITH_SKIPS, _WITHOUT_SKIPS = _kernels(may_skip=True), _kernels(may_skip=False)


def model_kernels(*, may_skip: bool) -> tuple[Kernel, ...]:
    """All kernels that experts in a transformers model may use, in order of preference.

    Args:
        may_skip: whether picks may be no expert; transformers' functions skip them only if told so.
    """
    return _WITH_SKIPS if may_skip else _WITHOUT_SKIPS
