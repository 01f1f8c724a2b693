"""Tokens, picks and experts on several ranks, and what all of them give in one process."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from moesaic.dist.exchange import Traffic
from moesaic.dist.exchange.hierarchical import groups_by_node
from moesaic.dist.expert_parallel import ExchangeName, ExpertParallel
from moesaic.dist.placement import distribute, expert_placements, local_part
from moesaic.layer import CapacityConfig, Experts, ExpertsConfig

D, F, K = 8, 12, 3


@dataclass(frozen=True)
class Case:
    """Tokens of each rank, how they pick, and how experts are spread.

    Attributes:
        tokens: how many each rank has.
        picks: a kind of `picks`.
        experts: N.
        exchange: that of `ExpertParallel`.
        esp: ranks that split each expert.
        nodes: 0 for the all-to-all in one step, or the number of nodes for that in two.
        dtype: of tokens and experts.
    """

    tokens: tuple[int, ...]
    picks: str = "random"
    experts: int = 8
    exchange: ExchangeName = "ragged"
    esp: int = 1
    nodes: int = 0
    dtype: torch.dtype = torch.float64
    traffic: Traffic | None = field(default=None, compare=False)


def picks(case: Case, tokens: int, rank: int, generator: torch.Generator) -> Tensor:
    """index_TK; its K picks differ, or are no expert."""
    index_TK = torch.rand(tokens, case.experts, generator=generator).topk(K).indices
    match case.picks:
        case "one expert":
            index_TK[:, 0] = 0
            index_TK[:, 1:] = case.experts
        case "some nothing":
            index_TK[torch.rand(tokens, K, generator=generator) < 0.4] = case.experts
        case "no picks":
            index_TK = index_TK[:, :0]
        case "nothing":
            index_TK[:] = case.experts
        case "own rank":
            share = case.experts // (len(case.tokens) // case.esp)
            index_TK = rank // case.esp * share + index_TK % share
            index_TK[:, 1:] = case.experts
    return index_TK


def inputs(case: Case, rank: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x_TD, index_TK, weight_TK and the gradient of y_TD on a rank."""
    generator = torch.Generator().manual_seed(100 + rank)
    tokens = case.tokens[rank]
    x_TD, grad_TD = (torch.randn(tokens, D, generator=generator, dtype=torch.float64) for _ in range(2))
    weight_TK = torch.rand(tokens, K, generator=generator, dtype=torch.float64)
    weight_dtype = torch.promote_types(case.dtype, torch.float32)
    index_TK = picks(case, tokens, rank, generator)
    weight_TK = weight_TK[:, : index_TK.shape[1]].to(weight_dtype)
    return x_TD.to(case.dtype), index_TK, weight_TK, grad_TD.to(case.dtype)


def all_experts(case: Case, kernel: Any = "loop") -> Experts:
    torch.manual_seed(0)
    config = ExpertsConfig(num_experts=case.experts, intermediate_size=F, bias=True, kernel=kernel)
    experts = Experts(config, D)
    for parameter in experts.parameters():
        nn.init.normal_(parameter)
    return experts.to(case.dtype)


def one_process(case: Case, rank: int) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Outputs and gradients of x and weight of a rank's tokens, and the gradients of all experts from all tokens."""
    experts = all_experts(case)
    everyone = [inputs(case, other) for other in range(len(case.tokens))]
    x, index, weight, grad = (torch.cat(parts) for parts in zip(*everyone, strict=True))
    x, weight = x.requires_grad_(), weight.requires_grad_()
    y = experts(x, index, weight)
    y.backward(grad)
    assert x.grad is not None
    assert weight.grad is not None
    own = [values.split(list(case.tokens))[rank] for values in (y.detach(), x.grad, weight.grad)]
    return own, {name: grad_of(parameter) for name, parameter in experts.named_parameters()}


def spread(case: Case, kernel: Any = "loop") -> tuple[ExpertParallel, Experts, DeviceMesh]:
    """The dispatch and this rank's experts."""
    mesh = init_device_mesh("cpu", (dist.get_world_size() // case.esp, case.esp), mesh_dim_names=("ep", "esp"))
    experts = all_experts(case, kernel)
    for name, parameter in list(experts.named_parameters()):
        experts.register_parameter(name, distribute(parameter, mesh, expert_placements(experts, name)))
    dispatch = ExpertParallel(
        case.experts,
        mesh.get_group("ep"),
        esp_group=mesh.get_group("esp"),
        exchange=case.exchange,
        node_groups=groups_by_node(mesh, "ep", mesh.size(0) // case.nodes) if case.nodes else None,
        capacity=CapacityConfig(factor=1.0),
        traffic=case.traffic,
    )
    return dispatch, experts, mesh


def on_rank(case: Case, slots: int | None = None) -> tuple[list[Tensor], dict[str, Tensor], DeviceMesh]:
    """What `one_process` gives, of this rank's tokens and this rank's part of the experts."""
    dispatch, experts, mesh = spread(case)
    x, index, weight, grad = inputs(case, dist.get_rank())
    x, weight = x.requires_grad_(), weight.requires_grad_()
    travel = dispatch.send(x, index, weight, slots=slots)
    y = travel.combine(experts(*travel.arrive()))
    y.backward(grad)
    grads = {name: grad_of(parameter) for name, parameter in experts.named_parameters()}
    return [y.detach(), grad_of(x), grad_of(weight)], grads, mesh


def own_part(whole: Tensor, name: str, case: Case, mesh: DeviceMesh) -> Tensor:
    return local_part(whole, mesh, expert_placements(all_experts(case), name))


def grad_of(tensor: Tensor) -> Tensor:
    """The gradient, or this rank's part of it."""
    assert tensor.grad is not None
    return tensor.grad.to_local() if isinstance(tensor.grad, DTensor) else tensor.grad


def most_picked(case: Case) -> int:
    """The most tokens of one rank that pick the same expert: slots that a capacity would need."""
    indices = [inputs(case, rank)[1].reshape(-1) for rank in range(len(case.tokens))]
    return max(int(torch.bincount(index, minlength=case.experts + 1)[: case.experts].max()) for index in indices)
