"""DeepSpeed's MoE layer and our block with the same weights; imports DeepSpeed."""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.moe.layer import MoE
from torch import Tensor, nn

from moesaic.layer import MoEBlock, MoESpec

HIDDEN, WIDTH, EXPERTS = 16, 12, 4
PROJECTIONS = ("gate_up", "down")
# Their gates by K, and what in our capacity is the same; random selection has no equal picks, so it must not bind.
GATES: dict[int, dict[str, Any]] = {
    1: {"policy": "random"},
    2: {"choice_order": "rank_first", "renormalize": True},
    3: {"policy": "probability", "renormalize": True},
}


class GatedExpert(nn.Module):
    """The experts that both compute, in the form that DeepSpeed copies."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up = nn.Linear(HIDDEN, 2 * WIDTH, bias=False)
        self.down = nn.Linear(WIDTH, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(nn.functional.silu(gate) * up)


def both(k: int, factor: float | None, minimum: int = 4, ep: int = 1, rank: int = 0) -> tuple[Any, MoEBlock]:
    """Their layer, and our block with its weights; with `ep` ranks each has the experts of `rank` only."""
    local = EXPERTS // ep
    theirs = MoE(
        HIDDEN,
        GatedExpert(),
        EXPERTS,
        ep_size=ep,
        k=k,
        capacity_factor=factor or 1.0,
        min_capacity=minimum,
        drop_tokens=factor is not None,
        top2_2nd_expert_sampling=False,
    )
    spec: dict[str, Any] = {
        "experts": {"num_experts": EXPERTS, "intermediate_size": WIDTH},
        "router": {"top_k": k, "normalize_top_k": k > 1},
    }
    if factor is not None:
        spec["capacity"] = {"factor": factor, "minimum": minimum, "scope": "batch", **GATES[k]}
    ours = MoEBlock(MoESpec.from_dict(spec), HIDDEN)
    generator = torch.Generator().manual_seed(k)
    with torch.no_grad():
        for parameter in weights(ours):
            parameter.normal_(std=0.3, generator=generator)
        for name in PROJECTIONS:
            whole = ours.experts.get_parameter(f"{name}_proj")
            setattr(ours.experts, f"{name}_proj", nn.Parameter(whole[rank * local : (rank + 1) * local].clone()))
        for index, expert in enumerate(theirs.deepspeed_moe.experts.deepspeed_experts):
            for name in PROJECTIONS:
                getattr(expert, name).weight.copy_(ours.experts.get_parameter(f"{name}_proj")[index])
        theirs.deepspeed_moe.gate.wg.weight.copy_(ours.gate.get_parameter("weight"))
    ours.experts.num_experts = local
    return theirs, ours


def weights(block: MoEBlock) -> list[Tensor]:
    return [
        block.gate.get_parameter("weight"),
        *(block.experts.get_parameter(f"{n}_proj") for n in ("gate_up", "down")),
    ]


def part(theirs: Any, name: str, of: Any) -> Tensor:
    """`of` their parameters of a kind, in our shape."""
    if name == "gate":
        return of(theirs.deepspeed_moe.gate.wg.weight)
    return torch.stack([of(getattr(expert, name).weight) for expert in theirs.deepspeed_moe.experts.deepspeed_experts])
