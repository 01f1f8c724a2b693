"""transformers' experts functions as kernels of the registry: numbers, refusals, what auto takes."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.hf.tiny import tiny_model, token_ids
from tests.layer.kernels.cases import LOOP, TOLERANCE, assert_close, make_call
from torch import Tensor
from transformers.integrations import deepgemm, sonicmoe

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


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_auto_on_a_gpu_takes_triton_where_theirs_do_not_suit() -> None:
    assert chosen(H100) == "grouped_mm"
    assert chosen(H100._replace(dtype=torch.float16, weight_dtype=torch.float16)) == "triton"
    assert chosen(H100._replace(hidden=1023)) == "triton"
    assert chosen(H100._replace(capability=(7, 5))) == "grouped"


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


def plain_sonicmoe(hidden_TD, score_S, token_S, expert_S, w1_HDN, b1_NH, w2_DFN, b2_ND, *, concat_layout, **options):
    """What the kernel of sonic-moe is given and gives back, in plain torch."""
    assert options["activation_type"] == "SWIGLU"
    y_TD = torch.zeros_like(hidden_TD)
    for score, token, expert in zip(score_S, token_S.tolist(), expert_S.tolist(), strict=True):
        up_H = w1_HDN[..., expert] @ hidden_TD[token] + (0 if b1_NH is None else b1_NH[expert])
        gate_F, up_F = up_H.chunk(2) if concat_layout else (up_H[::2], up_H[1::2])
        down_D = w2_DFN[..., expert] @ (torch.nn.functional.silu(gate_F) * up_F)
        y_TD[token] += score * (down_D + (0 if b2_ND is None else b2_ND[expert]))
    return y_TD, None


def grouped_product(*, transposed: bool) -> Any:
    def product(rows: Tensor, weight: Tensor, out: Tensor, layout: Tensor, **options: Any) -> None:
        for row, expert in enumerate(layout.tolist()):
            if expert >= 0:
                out[row] = rows[row] @ (weight[expert] if transposed else weight[expert].t())

    return product


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("sonicmoe", "silu_gated"),
        ("deepgemm", "silu_gated"),
        ("deepgemm", "gelu_gated_biased"),
        ("deepgemm", "relu_gated_transposed"),
        ("deepgemm", "relu2_plain"),
    ],
)
def test_kernels_of_the_hub_are_handed_what_they_expect(
    name: str, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers' function with plain torch in place of the GPU code that it loads."""
    enum = SimpleNamespace(SWIGLU="SWIGLU")
    sonic = SimpleNamespace(activation_type_enum=enum, moe_general_routing_inputs=plain_sonicmoe)
    monkeypatch.setattr(sonicmoe, "load_sonicmoe_kernel", lambda: sonic)
    deep = SimpleNamespace(
        grouped_bf16_matmul_nt=grouped_product(transposed=False),
        grouped_bf16_matmul_nn=grouped_product(transposed=True),
        m_alignment=8,
    )
    monkeypatch.setattr(deepgemm, "load_deepgemm_kernel", lambda: deep)
    monkeypatch.setattr(deepgemm, "is_sm100", lambda: False)
    kernel = next(kernel for kernel in model_kernels(may_skip=False) if kernel.name == name)
    with torch.no_grad():
        call = make_call(layout, size="larger", dtype=torch.bfloat16)
        exact = make_call(layout, size="larger", dtype=torch.bfloat16, exact=True)
        assert_close({"y": call.output(kernel)}, {"y": exact.output(LOOP)}, TOLERANCE[torch.bfloat16])
