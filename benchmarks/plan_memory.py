"""Predicted memory and traffic of layouts against real runs of 1, 2 and 4 processes: writes docs/benchmarks/plan-memory.md.

    python benchmarks/plan_memory.py

Each case trains two steps in processes of its own over gloo, on this machine, and measures the second.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

import moesaic
from moesaic.dist import Layout, Meshes, ParallelConfig, clip_grad_norm, parallelize, sync_replicated
from moesaic.dist.plan import Candidate, Cluster, Link, Workload, plan
from moesaic.dist.plan.measure import Measured, SentBytes, measure_step
from moesaic.files import write_text
from moesaic.layer import MoESpec
from moesaic.papers.machine import describe_machine
from moesaic.train.optimizer import parameter_groups

PAGE = Path("docs/benchmarks/plan-memory.md")
BACKBONE: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "vocab_size": 4096,
}
MOE: dict[str, Any] = {
    "experts": {"num_experts": 16, "intermediate_size": 128},
    "router": {"type": "top_k", "top_k": 4, "normalize_top_k": True},
    "balance": [{"type": "load_balancing", "coefficient": 0.01}],
    "shared_experts": {"num_experts": 1},
    "layers": {"first_dense": 1},
}
ROWS, LENGTH = 16, 128


@dataclass(frozen=True)
class Case:
    """One comparison: processes, layout, and what a step does."""

    world: int
    parallel: dict[str, Any]
    bf16: bool = False
    checkpointing: bool = False
    accumulation: int = 1

    @property
    def label(self) -> str:
        """As the table calls it."""
        sizes = [f"`{name}: {value}`" for name, value in self.parallel.items()] or ["defaults"]
        options = ["bf16"] * self.bf16 + ["recomputed"] * self.checkpointing
        options += [f"{self.accumulation} micro-batches"] * (self.accumulation > 1)
        return ", ".join([*sizes, *options])


CASES = [
    Case(1, {}),
    Case(1, {}, bf16=True, checkpointing=True),
    Case(2, {}),
    Case(2, {}, bf16=True, checkpointing=True),
    Case(2, {"dp_replicate": 2}),
    Case(2, {"partition_embedding": True}),
    Case(2, {"ep": 2}),
    Case(2, {"esp": 2}),
    Case(4, {}),
    Case(4, {"ep": 4}),
    Case(4, {"ep": 4}, checkpointing=True, accumulation=2),
    Case(4, {"ep": 2, "esp": 2}),
    Case(4, {"dp_replicate": 2, "ep": 4}, bf16=True),
    Case(4, {"ep": 4, "exchange": "all_gather"}),
]


def main() -> None:
    """Measure all cases and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=PAGE, help="Page to write.")
    output: Path = parser.parse_args().output
    multiprocessing.set_forkserver_preload(["moesaic.dist.plan.measure", "moesaic.train.optimizer"])
    rows = []
    for case in CASES:
        candidate, ranks = predict(case), run(case)
        rows.append(row(case, candidate, ranks))
        print(rows[-1], flush=True)
    write_text(output, page(rows))


def predict(case: Case) -> Candidate:
    """What the plan says."""
    spec = MoESpec.from_dict(MOE)
    with torch.device("meta"):
        model = moesaic.build(BACKBONE, spec)
    config = ParallelConfig.from_dict(case.parallel)
    cluster = Cluster(1, case.world, 80e9, 1e12, Link(1e-10), Link(1e-10))
    workload = Workload(ROWS, LENGTH, case.accumulation, case.bf16, case.checkpointing, accelerated=False)
    layout = Layout.of(config, case.world, spec)
    return next(found for found in plan(model, spec, workload, cluster, config).candidates if found.layout == layout)


def run(case: Case) -> list[tuple[Measured, dict[str, int]]]:
    """What each process of a real run measures."""
    with tempfile.TemporaryDirectory() as folder:
        start_processes(_rank, (case, folder), nprocs=case.world, start_method="forkserver")
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(case.world)]


def _rank(rank: int, case: Case, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(case.world), LOCAL_WORLD_SIZE=str(case.world)
    )
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=case.world)
    torch.manual_seed(0)
    spec, config = MoESpec.from_dict(MOE), ParallelConfig.from_dict(case.parallel)
    model = moesaic.build(BACKBONE, spec).float().train()
    model.set_training_progress(0.0)
    if case.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    sharded = None
    if case.world > 1:
        sharded = parallelize(
            model,
            Meshes.of(Layout.of(config, case.world, spec), "cpu"),
            config,
            param_dtype=torch.bfloat16 if case.bf16 else None,
        )
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), fused=True)
    ids_BS = torch.randint(BACKBONE["vocab_size"], (ROWS, LENGTH)).chunk(case.world)[rank]

    def backward() -> None:
        for micro_batch in range(case.accumulation):
            if sharded is not None:
                sharded.set_last_micro_batch(micro_batch == case.accumulation - 1)
            inputs = {"input_ids": ids_BS, "labels": ids_BS, "num_items_in_batch": ROWS * LENGTH, "use_cache": False}
            with torch.autocast("cpu", torch.bfloat16, enabled=case.bf16):
                output = model(**inputs, output_routing=True)
            loss, routing = output.loss, output.routing  # what the training loop keeps
            del output
            loss.backward()
            del routing

    def update() -> None:
        if sharded is not None:
            sync_replicated(sharded.replicated)
            clip_grad_norm(model.parameters(), 1.0)
        optimizer.step()

    memory = measure_step(model, optimizer, backward, update)
    with SentBytes() as sent:
        backward()
        update()
    torch.save((memory, sent.by_collective), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def row(case: Case, candidate: Candidate, ranks: list[tuple[Measured, dict[str, int]]]) -> str:
    """A line of the table: megabytes and ratios, predicted over measured."""
    memory = candidate.memory
    cells = [str(case.world), case.label]
    for name in ("parameters", "gradients", "optimizer"):
        found = max(getattr(rank, name) for rank, _ in ranks)
        cells.append(f"{found / 1e6:.2f} ({getattr(memory, name) / found:.3f})")
    peak = fmean(rank.peak for rank, _ in ranks)
    cells += [f"{memory.peak / 1e6:.1f}", f"{peak / 1e6:.1f}", f"**{memory.peak / peak:.3f}**"]
    planned = sum(flow.bytes for flow in candidate.flows)
    sent = fmean(sum(counts.values()) for _, counts in ranks)
    cells.append("-" if case.world == 1 else f"{planned / 1e6:.1f} / {sent / 1e6:.1f}")
    return f"| {' | '.join(cells)} |"


def page(rows: list[str]) -> str:
    """The whole page."""
    return f"""# Planned against measured memory

What [`moesaic plan`](../plan.md) predicts, beside real training steps of 1, 2 and 4 processes over gloo.

<!-- no-run: takes minutes -->
```bash
python benchmarks/plan_memory.py
```

A llama of width {BACKBONE["hidden_size"]} with {BACKBONE["num_hidden_layers"]} layers, the first dense, the others with
{MOE["experts"]["num_experts"]} experts of width {MOE["experts"]["intermediate_size"]}, {MOE["router"]["top_k"]} picks and
a shared expert; {ROWS} sequences of {LENGTH} tokens. Parameters, gradients and optimiser are the bytes of their storages
on the rank with most, in MB, with predicted over measured in parentheses. The peak is the most that PyTorch's allocator
had given out at once in the second step, mean over ranks, since a router that has learnt nothing does not balance its
load as the prediction does. The last column is all that a rank sends in a step, in MB: parameters gathered, gradients
reduced and summed over replicas, tokens.

| ranks | layout and step | parameters | gradients | optimiser | peak predicted | measured | ratio | sent: predicted / counted |
|---|---|---|---|---|---|---|---|---|
{chr(10).join(rows)}

Measured on {describe_machine()}.
"""


if __name__ == "__main__":
    main()
