"""Our MoE block beside DeepSpeed's MoE layer, on one process and with experts spread over two: writes a page.

    pip install --no-build-isolation deepspeed
    python benchmarks/expert_parallel.py

Both layers have the same router and expert weights and get the same tokens; outputs and all gradients are compared before
anything is timed. Processes talk over gloo on this machine and share its cores. Contenders take turns: a round runs
each once, and its time is that of the slowest process.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor, nn

from moesaic.dist.expert_parallel import ExpertParallel
from moesaic.files import write_text
from moesaic.layer import LoadBalancing, MoEBlock, MoESpec, RoutingContext
from moesaic.papers.machine import describe_machine

PAGE = Path("docs/benchmarks/expert-parallel.md")


@dataclass(frozen=True)
class Cell:
    """One comparison.

    Attributes:
        world: processes, over which the experts are spread.
        hidden: D.
        width: F.
        experts: N over all processes.
        top_k: K.
        tokens: for each process.
        factor: of the capacity; None drops nothing.
    """

    world: int
    hidden: int
    width: int
    experts: int
    top_k: int
    tokens: int
    factor: float | None

    @property
    def label(self) -> str:
        """In words."""
        limit = "no drops" if self.factor is None else f"capacity {self.factor:g}"
        return f"D {self.hidden}, F {self.width}, N {self.experts}, K {self.top_k}, {limit}"


SHAPES = [(256, 512, 8, 2, 2048), (256, 128, 64, 8, 1024)]
CELLS = [Cell(world, *shape, factor) for world in (1, 2) for shape in SHAPES for factor in (None, 1.0)]
# DeepSpeed's gates for K = 2 and for more, in the fields of our capacity.
CAPACITY = {"scope": "batch", "minimum": 4, "renormalize": True}
GATES = {2: {"choice_order": "rank_first"}, 8: {"policy": "probability"}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args()
    found: list[dict[str, Any]] = []
    for world in sorted({cell.world for cell in CELLS}):
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(_rank, (world, folder, options.rounds), nprocs=world)
            found += json.loads((Path(folder) / "answer.json").read_text(encoding="utf-8"))
    result = {"machine": describe_machine(), "deepspeed": _version(), "rounds": options.rounds, "cells": found}
    write_text(options.page.with_suffix(".json"), json.dumps(result, indent=1) + "\n")
    write_text(options.page, page(result))
    print(options.page.read_text(encoding="utf-8"))


def _version() -> str:
    import deepspeed

    return deepspeed.__version__


# --- Ranks ------------------------------------------------------------------------------------------------------------


class GatedExpert(nn.Module):
    """An expert in the form that DeepSpeed copies."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(hidden, 2 * width, bias=False)
        self.down = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(nn.functional.silu(gate) * up)


def _rank(rank: int, world: int, folder: str, rounds: int) -> None:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world))
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    _start_deepspeed()
    found = [_measure(cell, rank, rounds) for cell in CELLS if cell.world == world]
    if rank == 0:
        (Path(folder) / "answer.json").write_text(json.dumps(found), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


def _start_deepspeed() -> None:
    import deepspeed.comm

    # Starting would compile an all-reduce over shared memory; `deepspeed.comm.torch` is PyTorch itself.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    deepspeed.comm.init_distributed("gloo", verbose=False)


def _theirs(cell: Cell) -> nn.Module:
    from deepspeed.moe.layer import MoE

    layer = MoE(
        cell.hidden,
        GatedExpert(cell.hidden, cell.width),
        cell.experts,
        ep_size=cell.world,
        k=cell.top_k,
        capacity_factor=cell.factor or 1.0,
        drop_tokens=cell.factor is not None,
        top2_2nd_expert_sampling=False,
    )
    layer.set_deepspeed_parallelism()
    return layer


def _ours(cell: Cell, exchange: Any) -> MoEBlock:
    """Our block, whose experts are those of this rank."""
    spec: dict[str, Any] = {
        "experts": {"num_experts": cell.experts, "intermediate_size": cell.width},
        "router": {"top_k": cell.top_k, "normalize_top_k": True},
    }
    if cell.factor is not None:
        spec["capacity"] = {"factor": cell.factor, **CAPACITY, **GATES[cell.top_k]}
    block = MoEBlock(MoESpec.from_dict(spec), cell.hidden)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(std=0.05, generator=generator)
    if cell.world > 1:
        assert dist.group.WORLD is not None
        block.dispatch = ExpertParallel(cell.experts, dist.group.WORLD, exchange=exchange, capacity=block.capacity)
        local, rank = cell.experts // cell.world, dist.get_rank()
        for name in ("gate_up_proj", "down_proj"):
            whole = block.experts.get_parameter(name)
            setattr(block.experts, name, nn.Parameter(whole[rank * local : (rank + 1) * local].detach().clone()))
        block.experts.num_experts = local
    return block


def _copy(ours: MoEBlock, theirs: Any) -> None:
    with torch.no_grad():
        theirs.deepspeed_moe.gate.wg.weight.copy_(ours.gate.get_parameter("weight"))
        for index, expert in enumerate(theirs.deepspeed_moe.experts.deepspeed_experts):
            expert.gate_up.weight.copy_(ours.experts.get_parameter("gate_up_proj")[index])
            expert.down.weight.copy_(ours.experts.get_parameter("down_proj")[index])


def _gradients(layer: nn.Module) -> list[Tensor | None]:
    """Of router and experts, in our shape."""
    if isinstance(layer, MoEBlock):
        experts = (layer.experts.get_parameter("gate_up_proj").grad, layer.experts.get_parameter("down_proj").grad)
        return [layer.gate.get_parameter("weight").grad, *experts]
    moe: Any = layer.deepspeed_moe
    experts = moe.experts.deepspeed_experts
    return [
        moe.gate.wg.weight.grad,
        *(torch.stack([getattr(expert, name).weight.grad for expert in experts]) for name in ("gate_up", "down")),
    ]


def _output(layer: nn.Module, x_BTD: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """y and the load-balancing loss, which DeepSpeed's layer computes in any case."""
    if not isinstance(layer, MoEBlock):
        return layer(x_BTD)[:2]
    context = RoutingContext()
    y_BTD, routing = layer(x_BTD, context), context.records[0]
    balance = LoadBalancing(coefficient=1, scope="batch", counts="first" if top_k == 2 else "all")
    return y_BTD, balance.per_sequence(routing, context)[0]


def _measure(cell: Cell, rank: int, rounds: int) -> dict[str, Any]:
    """Compare, then time everybody in turns."""
    exchanges = ["ragged"] + ["padded"] * (cell.factor is not None and cell.world > 1)
    blocks = {f"moesaic, {name}" if cell.world > 1 else "moesaic": _ours(cell, name) for name in exchanges}
    layers: dict[str, nn.Module] = {"deepspeed": _theirs(cell), **blocks}
    _copy(next(iter(blocks.values())), layers["deepspeed"])
    generator = torch.Generator().manual_seed(1 + rank)
    x_BTD = torch.randn(1, cell.tokens, cell.hidden, generator=generator)
    grad_BTD = torch.randn(x_BTD.shape, generator=generator) / cell.tokens

    def forward(layer: nn.Module) -> Callable[[], object]:
        def run() -> object:
            with torch.no_grad():
                return _output(layer, x_BTD, cell.top_k)

        return run

    def step(layer: nn.Module) -> Callable[[], list[Tensor | None]]:
        def run() -> list[Tensor | None]:
            leaf_BTD = x_BTD.detach().requires_grad_()
            y_BTD, loss = _output(layer, leaf_BTD, cell.top_k)
            torch.autograd.backward([y_BTD, loss], [grad_BTD, torch.tensor(0.01)])
            return [y_BTD.detach(), loss.detach(), leaf_BTD.grad]

        return run

    seen = {name: [*step(layer)(), *_gradients(layer)] for name, layer in layers.items()}
    worst = max(
        float((mine - theirs).norm() / theirs.norm())  # type: ignore[operator, union-attr]
        for name in blocks
        for mine, theirs in zip(seen[name], seen["deepspeed"], strict=True)
    )
    if not worst < 1e-4:
        raise SystemExit(f"{cell.label}: outputs or gradients differ by {worst:.1e} of their length")
    seconds = {}
    for case, make in {"forward": forward, "forward-backward": step}.items():
        calls = {name: make(layer) for name, layer in layers.items()}
        seconds[case] = _turns(calls, layers, rounds)
    return {"cell": asdict(cell), "label": cell.label, "distance": worst, "seconds": seconds}


def _turns(calls: dict[str, Callable[[], object]], layers: dict[str, nn.Module], rounds: int) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(-1, rounds):  # the first warms up
        names = list(calls)
        for name in names[round_ % len(names) :] + names[: round_ % len(names)]:
            layers[name].zero_grad()
            dist.barrier()
            started = time.perf_counter()
            calls[name]()
            seconds = torch.tensor([time.perf_counter() - started], dtype=torch.float64)
            dist.all_reduce(seconds, dist.ReduceOp.MAX)
            if round_ >= 0:
                found[name].append(seconds.item())
    return found


# --- What is written --------------------------------------------------------------------------------------------------


def page(result: dict[str, Any]) -> str:
    worlds = sorted({found["cell"]["world"] for found in result["cells"]})
    tables = "\n\n".join(_table(result, world) for world in worlds)
    worst = max(found["distance"] for found in result["cells"])
    return f"""# Expert parallelism beside DeepSpeed

Our MoE block beside DeepSpeed's MoE layer ({result["deepspeed"]}) with the same router and experts (SwiGLU, float32) on the same
tokens: in one process, and with the experts spread over two that talk over gloo. Both compute the load-balancing loss.

<!-- no-run: takes minutes, and DeepSpeed is no dependency -->
```bash
python benchmarks/expert_parallel.py
```

Before anything is timed, output, loss and the gradients of tokens, router and experts are compared: they differ by
{worst:.0e} of their length at most. Times are medians of {result["rounds"]} rounds in turns, of the slower process where there are two; a ratio above 1
means that ours is faster. Tokens a second are those of all processes.

{tables}

DeepSpeed sends a block of slots for each expert, as many as the capacity allows; without drops, as many as the fullest expert
of any process needs. Ours sends each token once to each process that holds one of its experts: in parts of their own size
(`ragged`), for which processes first tell each other how many come, or in blocks of the size that a capacity allows (`padded`).
On one process there is no exchange, and the difference is that of dispatch and experts: DeepSpeed runs experts one after the
other on padded blocks, ours all rows in one native kernel ([Kernels](../kernels.md)).

A network was not between these processes: they share the memory of one machine and its cores, each process with
an equal share of threads. What links add is on [Two hosts](two-hosts.md).

Measured on {result["machine"]}.
"""


def _table(result: dict[str, Any], world: int) -> str:
    lines = [
        f"## {'One process' if world == 1 else f'{world} processes'}",
        "",
        "| layer | pass | DeepSpeed, ms | moesaic | ms | tokens/s | ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    for found in (found for found in result["cells"] if found["cell"]["world"] == world):
        for case, seconds in found["seconds"].items():
            medians = {name: statistics.median(samples) for name, samples in seconds.items()}
            for name in (name for name in medians if name != "deepspeed"):
                cells = [
                    found["label"],
                    case,
                    f"{1e3 * medians['deepspeed']:.1f}",
                    name.partition(", ")[2] or "one process",
                    f"{1e3 * medians[name]:.1f}",
                    f"{world * found['cell']['tokens'] / medians[name]:,.0f}",
                    f"{medians['deepspeed'] / medians[name]:.2f}",
                ]
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
