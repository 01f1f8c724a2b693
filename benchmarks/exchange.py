"""What it saves to send a token once to each rank instead of once for each pick: writes docs/benchmarks/exchange.md.

    python benchmarks/exchange.py

Processes on this machine exchange the same tokens in several ways, in turns. Experts are left out: each row comes back
as it went.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from moesaic.dist.exchange import Traffic
from moesaic.dist.expert_parallel import ExpertParallel
from moesaic.files import write_text
from moesaic.layer import CapacityConfig
from moesaic.papers.machine import describe_machine

PAGE = Path("docs/benchmarks/exchange.md")
NUM_EXPERTS, TOP_K = 64, 8
ONCE, EACH_PICK = "ragged, once a rank", "ragged, a row for each pick"


@dataclass(frozen=True)
class Measured:
    """One way to exchange: megabytes that a rank sends, forward and backward, and seconds of each round."""

    megabytes: float
    seconds: list[float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=2048, help="on each rank")
    parser.add_argument("--hidden-size", type=int, default=1024)
    parser.add_argument("--ranks", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        spawn(_rank, (options, folder), nprocs=options.ranks)
        found = torch.load(Path(folder) / "found.pt", weights_only=False)
    page = render(found, options)
    write_text(PAGE, page)
    print(page)


def _rank(rank: int, options: argparse.Namespace, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=options.ranks)
    found = measure(options)
    if rank == 0:
        torch.save(found, Path(folder) / "found.pt")
    dist.barrier()
    dist.destroy_process_group()


def measure(options: argparse.Namespace) -> dict[str, Measured]:
    torch.manual_seed(dist.get_rank())
    tokens, width = options.tokens, options.hidden_size
    index_TK = torch.rand(tokens, NUM_EXPERTS).topk(TOP_K).indices
    weight_TK = torch.rand(tokens, TOP_K).softmax(-1)
    x_TD, grad_TD = torch.randn(2, tokens, width).bfloat16()
    traffic, group = Traffic(), dist.group.WORLD
    assert isinstance(group, dist.ProcessGroup)
    capacity = CapacityConfig(factor=2.0)
    ragged = ExpertParallel(NUM_EXPERTS, group, traffic=traffic)
    padded = ExpertParallel(NUM_EXPERTS, group, exchange="padded", capacity=capacity, traffic=traffic)
    gathered = ExpertParallel(NUM_EXPERTS, group, exchange="all_gather", traffic=traffic)
    slots = capacity.most(1, tokens, NUM_EXPERTS, TOP_K, training=True)

    def once(dispatch: ExpertParallel, slots: int | None = None) -> Callable[[], Tensor]:
        def step() -> Tensor:
            x, weight = x_TD.clone().requires_grad_(), weight_TK.clone().requires_grad_()
            return _round_trip(dispatch, x, index_TK, weight, slots)

        return step

    def each_pick() -> Tensor:
        """Picks as tokens of their own; their outputs are summed at home."""
        x, weight = x_TD.clone().requires_grad_(), weight_TK.clone().requires_grad_()
        rows = x.repeat_interleave(TOP_K, 0)
        y = _round_trip(ragged, rows, index_TK.reshape(-1, 1), weight.reshape(-1, 1), None)
        return y.view(tokens, TOP_K, width).sum(1, dtype=torch.float32).to(y.dtype)

    ways: dict[str, Callable[[], Tensor]] = {
        ONCE: once(ragged),
        EACH_PICK: each_pick,
        "padded": once(padded, slots),
        "all_gather": once(gathered),
    }
    for step in ways.values():
        step().backward(grad_TD)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    sent: dict[str, int] = {}
    for _ in range(options.rounds):
        for name, step in ways.items():
            traffic.take()
            dist.barrier()
            started = time.perf_counter()
            step().backward(grad_TD)
            dist.barrier()
            seconds[name].append(time.perf_counter() - started)
            sent[name] = traffic.take().bytes
    return {name: Measured(sent[name] / 1e6, seconds[name]) for name in ways}


def _round_trip(
    dispatch: ExpertParallel, x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor, slots: int | None
) -> Tensor:
    travel = dispatch.send(x_TD, index_TK, weight_TK, slots=slots)
    rows_RD, _, weight_RK = travel.arrive()
    # The smallest thing that gives weights a gradient, too.
    return travel.combine(rows_RD + weight_RK.sum(1, keepdim=True).to(rows_RD.dtype))


def rows_of_a_token(ranks: int) -> tuple[float, float]:
    """Rows that a token sends to other ranks with uniform picks: once a rank, and one for each pick."""
    share = NUM_EXPERTS // ranks
    reached = 1 - math.comb(NUM_EXPERTS - share, TOP_K) / math.comb(NUM_EXPERTS, TOP_K)
    return (ranks - 1) * reached, TOP_K * (ranks - 1) / ranks


def render(found: dict[str, Measured], options: argparse.Namespace) -> str:
    base = statistics.median(found[ONCE].seconds)
    rows = [
        f"| {name} | {way.megabytes:.1f} | {way.megabytes / found[ONCE].megabytes:.2f} | "
        f"{1e3 * statistics.median(way.seconds):.0f} | {statistics.median(way.seconds) / base:.2f} |"
        for name, way in found.items()
    ]
    expected = []
    for ranks in (2, 4, 8, 16, 32, 64):
        once, each = rows_of_a_token(ranks)
        expected.append(f"| {ranks} | {once:.2f} | {each:.2f} | {each / once:.2f} |")
    return f"""# What the exchange of tokens sends

Forward and backward of the way to {NUM_EXPERTS} experts on {options.ranks} ranks and back, without the experts: {options.tokens:,}
tokens a rank of width {options.hidden_size:,} in bfloat16, {TOP_K} uniform picks each. Processes of one thread on one machine, over
gloo. Bytes are those that one rank sends to others, medians are of {options.rounds} rounds; a round takes each way once.

<!-- no-run: takes a minute -->
```bash
python benchmarks/exchange.py
```

| exchange | MB sent | beside the first | ms | beside the first |
|---|---|---|---|---|
{chr(10).join(rows)}

"{EACH_PICK}" is what systems send that weight outputs at home; here it runs through the same code, with picks as
tokens. Its time grows more than its bytes, because all {TOP_K} rows of a token, also those that stay, are copied and summed on
the way. With {TOP_K} uniform picks almost every token is needed on both ranks, so that the even blocks of `padded` (a capacity
factor of 2 limits nothing here) and `all_gather` send hardly more than `ragged`; with more ranks they do. What `padded` saves
is a wait of the host for an accelerator, which a CPU does not have.

Rows that a token sends to other ranks, with uniform picks, computed:

| ranks | once a rank | a row for each pick | ratio |
|---|---|---|---|
{chr(10).join(expected)}

Measured on {describe_machine()}.
"""


if __name__ == "__main__":
    main()
