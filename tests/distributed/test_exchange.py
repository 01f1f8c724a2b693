"""Experts on several ranks equal all experts in one process, forward and backward."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.distributed.spawn import run_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from moesaic.dist.expert_parallel import ExchangeName, ExpertParallel
from moesaic.layer import Experts, ExpertsConfig

D, F, K = 6, 8, 3


@dataclass(frozen=True)
class Case:
    """Tokens of each rank, how they pick, and how experts are spread."""

    tokens: tuple[int, ...]
    picks: str = "random"
    experts: int = 8
    exchange: ExchangeName = "ragged"
    esp: int = 1
    nodes: int = 1
    options: dict[str, Any] = field(default_factory=dict)


def picks(case: Case, tokens: int, rank: int, generator: torch.Generator) -> Tensor:
    """index_TK; its K picks differ, or are no expert."""
    index_TK = torch.rand(tokens, case.experts, generator=generator).topk(K).indices
    match case.picks:
        case "skewed":
            index_TK[:, 0] = 0
            index_TK[:, 1:] = case.experts
        case "null":
            index_TK[torch.rand(tokens, K, generator=generator) < 0.4] = case.experts
        case "none":
            index_TK[:] = case.experts
        case "own":
            share = case.experts // len(case.tokens)
            index_TK = rank * share + index_TK % share
            index_TK[:, 1:] = case.experts
    return index_TK


def inputs(case: Case, rank: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x_TD, index_TK, weight_TK and the gradient of y_TD on a rank, float64."""
    generator = torch.Generator().manual_seed(100 + rank)
    tokens = case.tokens[rank]
    x_TD, grad_TD = (torch.randn(tokens, D, generator=generator, dtype=torch.float64) for _ in range(2))
    weight_TK = torch.rand(tokens, K, generator=generator, dtype=torch.float64)
    return x_TD, picks(case, tokens, rank, generator), weight_TK, grad_TD


def all_experts(case: Case) -> Experts:
    torch.manual_seed(0)
    config = ExpertsConfig(num_experts=case.experts, intermediate_size=F, bias=True, kernel="loop")
    experts = Experts(config, D).double()
    for parameter in experts.parameters():
        nn.init.normal_(parameter)
    return experts


def one_process(case: Case) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Outputs and gradients of x and weight over all ranks' tokens, and the gradients of the experts."""
    experts = all_experts(case)
    x, index, weight, grad = (
        torch.cat(parts) for parts in zip(*(inputs(case, rank) for rank in range(len(case.tokens))), strict=True)
    )
    x, weight = x.requires_grad_(), weight.requires_grad_()
    y = experts(x, index, weight)
    y.backward(grad)
    assert x.grad is not None
    assert weight.grad is not None
    return [y.detach(), x.grad, weight.grad], {name: p.grad for name, p in experts.named_parameters()}  # type: ignore[misc]


def groups(
    case: Case,
) -> tuple[dist.ProcessGroup, dist.ProcessGroup, tuple[dist.ProcessGroup, dist.ProcessGroup] | None]:
    """ep, esp and node groups of this rank."""
    world = dist.get_world_size()
    mesh = init_device_mesh("cpu", (world // case.esp, case.esp), mesh_dim_names=("ep", "esp"))
    if case.nodes == 1:
        return mesh["ep"].get_group(), mesh["esp"].get_group(), None
    nodes = init_device_mesh("cpu", (case.nodes, world // case.nodes), mesh_dim_names=("node", "local"))
    return mesh["ep"].get_group(), mesh["esp"].get_group(), (nodes["node"].get_group(), nodes["local"].get_group())


def shard(parameter: Tensor, name: str, case: Case, ep: dist.ProcessGroup, esp: dist.ProcessGroup) -> Tensor:
    """What a rank holds of packed experts."""
    return parameter.detach().chunk(ep.size())[ep.rank()].clone()


def on_ranks(cases: list[Case]) -> list[tuple[list[Tensor], dict[str, Tensor]]]:
    """For each case what `one_process` gives, of this rank's tokens and experts."""
    results = []
    for case in cases:
        rank = dist.get_rank()
        ep, esp, nodes = groups(case)
        experts = all_experts(case)
        for name, parameter in list(experts.named_parameters()):
            setattr(experts, name, nn.Parameter(shard(parameter, name, case, ep, esp)))
        dispatch = ExpertParallel(
            case.experts,
            ep,
            esp_group=esp,
            exchange=case.exchange,
            node_groups=nodes,
            **case.options,
        )
        x, index, weight, grad = inputs(case, rank)
        x, weight = x.requires_grad_(), weight.requires_grad_()
        travel = dispatch.send(x, index, weight)
        y = travel.combine(experts(*travel.arrive()))
        y.backward(grad)
        grads = {name: parameter.grad for name, parameter in experts.named_parameters()}
        results.append(([y.detach(), x.grad, weight.grad], grads))
    return results


TWO = [
    Case((7, 5)),
    Case((0, 9)),
    Case((6, 6), "skewed"),
    Case((5, 8), "null"),
    Case((3, 2), "none"),
    Case((4, 4), "own"),
    Case((0, 0)),
]
FOUR = [Case((5, 0, 9, 2)), Case((6, 6, 6, 6), "null"), Case((1, 2, 3, 4), experts=4)]


@pytest.mark.parametrize("cases", [TWO, FOUR], ids=["two", "four"])
def test_equals_one_process(cases: list[Case]) -> None:
    world = len(cases[0].tokens)
    found = run_ranks(world, on_ranks, cases)
    for case, *results in zip(cases, *found, strict=True):
        values, grads = one_process(case)
        for which, value in zip(("y", "x.grad", "weight.grad"), values, strict=True):
            assert_equal([ours.pop(0) for ours, _ in results], value, f"{which} of {case}")
        for name, value in grads.items():
            assert_equal([ours[name] for _, ours in results], value, f"{name} of {case}")


def assert_equal(parts: list[Tensor], whole: Tensor, what: str) -> None:
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-12, atol=1e-12, msg=lambda text: f"{what}: {text}")
