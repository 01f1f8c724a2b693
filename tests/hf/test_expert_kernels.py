"""transformers' experts functions as kernels of the registry: numbers, refusals, what auto takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.hf.tiny import tiny_model, token_ids

from moesaic.errors import UnsupportedKernel
from moesaic.hf.expert_kernels import model_kernels
from moesaic.layer.kernels import Case, FusedActivation, select

H100 = Case(
    device="cuda",
    capability=(9, 0),
    dtype=torch.bfloat16,
    weight_dtype=torch.bfloat16,
    autocast=None,
    tokens=2048,
    picks=8,
    experts=64,
    hidden=1024,
    width=512,
    fused=FusedActivation("silu", True),
    bias=False,
    transposed=False,
    needs_grad=False,
    may_skip=False,
    compiling=False,
)
THEIRS = ("batched_mm", "grouped_mm", "sonicmoe", "deepgemm")


def chosen(case: Case, *without: str) -> str:
    kernels = tuple(kernel for kernel in model_kernels(may_skip=case.may_skip) if kernel.name not in without)
    return select("auto", case, kernels).name


def test_auto_on_a_gpu_without_kernels_of_ours_decodes_batched_and_prefills_grouped() -> None:
    decode = H100._replace(tokens=1)
    assert chosen(decode, "triton") == "batched_mm"
    assert chosen(decode._replace(tokens=64), "triton") == "grouped_mm"
    assert chosen(decode._replace(needs_grad=True), "triton") == "grouped_mm"
    assert chosen(H100, "triton") == "grouped_mm"
    assert chosen(H100._replace(capability=(7, 5)), "triton") == "grouped"
    assert chosen(H100._replace(hidden=1023), "triton") == "grouped"


def test_auto_on_the_cpu_takes_none_of_them() -> None:
    for tokens in (1, 4, 256, 2048):
        case = H100._replace(device="cpu", capability=(0, 0), tokens=tokens)
        assert chosen(case) not in THEIRS


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("sonicmoe", {"device": "cpu"}, "needs a CUDA device, got cpu"),
        ("sonicmoe", {"fused": FusedActivation("silu", False)}, "computes only experts gated by silu or relu"),
        (
            "sonicmoe",
            {"fused": FusedActivation("clamped_swiglu", True, True, 1.702, 7.0)},
            "computes only experts gated by silu or relu",
        ),
        ("sonicmoe", {"fused": None}, "computes only experts gated by silu or relu"),
        ("sonicmoe", {"may_skip": True}, "can't skip picks of no expert"),
        ("deepgemm", {"device": "cpu"}, "needs a CUDA device, got cpu"),
        ("deepgemm", {"needs_grad": True}, "has no backward pass"),
        (
            "deepgemm",
            {"dtype": torch.float16, "weight_dtype": torch.float16},
            "needs torch.bfloat16, got torch.float16",
        ),
        ("deepgemm", {"may_skip": True}, "can't skip picks of no expert"),
        ("grouped_mm", {"width": 12}, "needs rows of whole 16 bytes, got F = 12 in torch.bfloat16"),
        (
            "grouped_mm",
            {"dtype": torch.float32},
            "input and weights of one dtype, got torch.float32 and torch.bfloat16",
        ),
        ("grouped_mm", {"dtype": torch.float64, "weight_dtype": torch.float64}, "got torch.float64"),
        ("grouped_mm", {"autocast": torch.float16}, "does not follow autocast from torch.bfloat16 to torch.float16"),
        ("batched_mm", {"dtype": torch.int64, "weight_dtype": torch.int64}, "needs floating point, got torch.int64"),
    ],
)
def test_each_says_why_it_can_not(
    name: str, changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = H100._replace(**changes)
    monkeypatch.setattr("moesaic.hf.expert_kernels.missing_for_experts_function", lambda name: None)
    with pytest.raises(UnsupportedKernel, match=f"experts.kernel = '{name}' cannot be used .*{message}"):
        select(name, case, model_kernels(may_skip=case.may_skip))


@pytest.mark.skipif(torch.cuda.is_available(), reason="may be there")
@pytest.mark.parametrize("name", ["sonicmoe", "deepgemm"])
def test_what_the_machine_lacks_is_said(name: str) -> None:
    with pytest.raises(UnsupportedKernel, match=f"{name}: .*(requires|unavailable)"):
        select(name, H100, model_kernels(may_skip=False))


@pytest.mark.parametrize("name", ["grouped_mm", "batched_mm"])
def test_a_spec_may_name_them(name: str) -> None:
    ids, found = token_ids(), []
    for kernel in ("loop", name):
        model = tiny_model(experts={"num_experts": 4, "intermediate_size": 16, "kernel": kernel})
        output = model(ids, labels=ids)
        output.loss.backward()
        found.append([output.logits, *(p.grad for p in model.parameters())])
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-5)
