"""Slots and merged experts against plain loops over tokens, forward and backward, with every kernel."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from moesaic.layer import Experts, ExpertsConfig
from moesaic.layer.activations import ACTIVATIONS
from moesaic.layer.assignment import Merge, Slots

N, D, B, LENGTH = 3, 4, 2, 5


def make_experts(kernel: str, *, gated: bool, bias: bool) -> Experts:
    torch.manual_seed(0)
    config = ExpertsConfig.from_dict(
        {"num_experts": N, "intermediate_size": 6, "gated": gated, "bias": bias, "kernel": kernel}
    )
    experts = Experts(config, D).double()
    for parameter in experts.parameters():
        nn.init.normal_(parameter)
    return experts


def feed_forward(x_D: Tensor, parameters: dict[str, Tensor]) -> Tensor:
    """One network with the parameters of one expert."""
    name = "gate_up_proj" if "gate_up_proj" in parameters else "up_proj"
    up_H = parameters[name] @ x_D + parameters.get(f"{name}_bias", torch.zeros(()))
    silu = ACTIVATIONS["silu"]
    if name == "gate_up_proj":
        half = up_H.shape[0] // 2
        up_H = silu(up_H[:half]) * up_H[half:]
    else:
        up_H = silu(up_H)
    return parameters["down_proj"] @ up_H + parameters.get("down_proj_bias", torch.zeros(()))


def parameters_of(experts: Experts, expert: int) -> dict[str, Tensor]:
    return {name: parameter[expert] for name, parameter in experts.named_parameters()}


def compare(
    experts: Experts, fast: Callable[[Tensor, Tensor], Tensor], slow: Callable[[Tensor, Tensor], Tensor], weight: Tensor
) -> None:
    """Values and gradients in tokens, weights and all experts' parameters are the same."""
    generator = torch.Generator().manual_seed(1)
    x_TD = torch.randn(B * LENGTH, D, dtype=torch.float64, generator=generator)
    upstream_TD = torch.randn(B * LENGTH, D, dtype=torch.float64, generator=generator)
    results = []
    for function in (fast, slow):
        x, w = x_TD.clone().requires_grad_(), weight.clone().requires_grad_()
        y_TD = function(x, w)
        inputs = [x, w, *experts.parameters()]
        results.append((y_TD, torch.autograd.grad(y_TD, inputs, upstream_TD)))
    torch.testing.assert_close(results[0], results[1], rtol=1e-10, atol=1e-10)


layouts = pytest.mark.parametrize(("gated", "bias"), [(True, False), (True, True), (False, True)])
kernels = pytest.mark.parametrize("kernel", ["loop", "grouped"])


@layouts
@kernels
@pytest.mark.parametrize("per_expert", [1, 2])
def test_slots_equal_a_loop_over_slots(kernel: str, gated: bool, bias: bool, per_expert: int) -> None:
    """Soft MoE, arXiv 2308.00951, eq. 2 and 3; one weight tensor holds both mixes."""
    experts = make_experts(kernel, gated=gated, bias=bias)
    slots = N * per_expert
    weight = torch.randn(2, B, LENGTH, slots, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def slow(x_TD: Tensor, weight: Tensor) -> Tensor:
        rows = []
        for sequence in range(B):
            x_LD = x_TD[sequence * LENGTH : (sequence + 1) * LENGTH]
            outputs = []
            for slot in range(slots):
                mixed_D = sum(weight[0, sequence, token, slot] * x_LD[token] for token in range(LENGTH))
                outputs.append(feed_forward(mixed_D, parameters_of(experts, slot // per_expert)))  # type: ignore[arg-type]
            rows += [
                sum(weight[1, sequence, token, slot] * outputs[slot] for slot in range(slots))
                for token in range(LENGTH)
            ]
        return torch.stack(rows)  # type: ignore[arg-type]

    compare(experts, lambda x, w: Slots(w[0], w[1], N).run(experts, x), slow, weight)


@layouts
@kernels
def test_merged_experts_equal_a_loop_over_tokens(kernel: str, gated: bool, bias: bool) -> None:
    """SMEAR, arXiv 2306.03745, section 3: one activation of averaged parameters; the last token passes no expert."""
    experts = make_experts(kernel, gated=gated, bias=bias)
    group_T = torch.tensor([0, 0, 1, 3, 3, 1, 0, 3, 1, 4])  # group 2 is empty, 4 is none
    weight_GN = torch.randn(4, N, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def slow(x_TD: Tensor, weight_GN: Tensor) -> Tensor:
        rows = []
        for token, group in enumerate(group_T.tolist()):
            if group == 4:
                rows.append(torch.zeros(D, dtype=torch.float64))
                continue
            merged = {
                name: sum(weight_GN[group, expert] * parameter[expert] for expert in range(N))
                for name, parameter in experts.named_parameters()
            }
            rows.append(feed_forward(x_TD[token], merged))  # type: ignore[arg-type]
        return torch.stack(rows)

    compare(experts, lambda x, w: Merge(w, group_T).run(experts, x), slow, weight_GN)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_output_has_the_dtype_of_the_input(dtype: torch.dtype, autocast: bool) -> None:
    experts = make_experts("auto", gated=True, bias=False).to(dtype)
    x_TD = torch.randn(B * LENGTH, D).to(dtype)
    mix_BLP = torch.full((B, LENGTH, N), 1 / N)
    assignments = (
        Slots(mix_BLP, mix_BLP, N),
        Merge(torch.full((B, N), 1 / N), torch.arange(B).repeat_interleave(LENGTH)),
    )
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for assignment in assignments:
            y_TD = assignment.run(experts, x_TD)
            assert y_TD.dtype == dtype
            assert y_TD.shape == x_TD.shape


def test_no_tokens_give_no_output() -> None:
    experts = make_experts("auto", gated=True, bias=True)
    x_TD, mix_BLP = torch.zeros(0, D, dtype=torch.float64), torch.zeros(1, 0, N, dtype=torch.float64)
    assert Slots(mix_BLP, mix_BLP, N).run(experts, x_TD).shape == (0, D)
    weight_GN = torch.ones(1, N, dtype=torch.float64)
    assert Merge(weight_GN, torch.zeros(0, dtype=torch.int64)).run(experts, x_TD).shape == (0, D)
