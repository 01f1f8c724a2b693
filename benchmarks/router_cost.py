"""What a router costs beside the experts it picks: writes docs/benchmarks/router-cost.md.

    python benchmarks/router_cost.py

Every router routes the same tokens, forward and backward, in turns: one round times each router once, so that a busy
moment of the machine falls on all of them.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor

from moesaic.files import write_text
from moesaic.layer import MoEBlock, MoESpec, Router, RouterConfig, RoutingContext
from moesaic.papers.machine import describe_machine

PAGE = Path("docs/benchmarks/router-cost.md")
NUM_EXPERTS, TOP_K, VOCABULARY = 64, 8, 32_000
CONTROL = "top_k"
ROUTERS: dict[str, dict[str, Any]] = {
    "top_k": {"type": "top_k", "top_k": TOP_K},
    "top_k, ties left to the device": {"type": "top_k", "top_k": TOP_K, "stable_ties": False},
    "top_k, sigmoid, 8 groups": {
        "type": "top_k",
        "top_k": TOP_K,
        "score_function": "sigmoid",
        "selection_bias": True,
        "num_groups": 8,
        "top_k_groups": 4,
        "group_score": "top2_sum",
    },
    "noisy_top_k": {"type": "noisy_top_k", "top_k": TOP_K},
    "sampled_second": {"type": "sampled_second"},
    "cosine": {"type": "cosine", "top_k": TOP_K},
    "threshold": {"type": "threshold"},
    "prototyped": {"type": "prototyped", "num_groups": TOP_K},
    "attention": {"type": "attention", "top_k": TOP_K},
    "mlp": {"type": "mlp", "top_k": TOP_K, "hidden_size": 256},
    "normalised": {"type": "normalised", "top_k": TOP_K},
    "dselect_k": {"type": "dselect_k", "num_selectors": 4},
    "null_experts": {"type": "null_experts", "top_k": 2 * TOP_K, "num_null": NUM_EXPERTS},
    "recurrent": {"type": "recurrent", "top_k": TOP_K, "state_size": 128},
    "hash": {"type": "hash", "vocabulary_size": VOCABULARY, "top_k": TOP_K},
    "stable": {"type": "stable", "vocabulary_size": VOCABULARY},
    "random": {"type": "random", "top_k": TOP_K},
    "expert_choice": {"type": "expert_choice", "capacity_factor": float(TOP_K)},
    "base_assignment": {"type": "base_assignment", "scope": "sequence"},
    "sinkhorn": {"type": "sinkhorn", "scope": "sequence"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--hidden-size", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    times = measure(options.tokens, options.hidden_size, options.rounds)
    page = render(times, options)
    write_text(PAGE, page)
    print(page)


def measure(tokens: int, hidden_size: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of forward and backward of each router, and of a whole block under "block", one a round."""
    torch.manual_seed(0)
    context = RoutingContext(batch_size=4, token_ids_T=torch.randint(VOCABULARY, (tokens,)), seed=torch.tensor(0))
    x_TD = torch.randn(tokens, hidden_size)
    steps: dict[str, Callable[[], None]] = {}
    for name, values in ROUTERS.items():
        router = TypeAdapter(RouterConfig).validate_python(values).build(hidden_size, NUM_EXPERTS).train()
        steps[name] = _router_step(router, x_TD, context)
    spec = MoESpec.from_dict(
        {"experts": {"num_experts": NUM_EXPERTS, "intermediate_size": 512}, "router": ROUTERS[CONTROL]}
    )
    steps["block"] = _block_step(MoEBlock(spec, hidden_size), x_TD)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds + 1):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - started)
    return {name: found[1:] for name, found in times.items()}  # the first round warms up


def _router_step(router: Router, x_TD: Tensor, context: RoutingContext) -> Callable[[], None]:
    def step() -> None:
        routing = router(x_TD.clone().requires_grad_(), context)
        loss = routing.weight_TK.sum() + routing.scores_TN.square().sum()
        if loss.requires_grad:
            loss.backward()
            router.zero_grad()

    return step


def _block_step(block: MoEBlock, x_TD: Tensor) -> Callable[[], None]:
    def step() -> None:
        block(x_TD.clone().requires_grad_()).sum().backward()
        block.zero_grad()

    return step


def render(times: dict[str, list[float]], options: argparse.Namespace) -> str:
    medians = {name: statistics.median(found) for name, found in times.items()}
    control, block = medians[CONTROL], medians["block"]
    rows = [
        f"| `{name}` | {1e3 * medians[name]:.1f} | {medians[name] / control:.2f} | {medians[name] / block:.1%} |"
        for name in ROUTERS
    ]
    return f"""# What a router costs

Forward and backward of the router alone, in training mode, beside `{CONTROL}` and beside a whole block with {NUM_EXPERTS} gated
experts of width 512 and {TOP_K} picks: {options.tokens:,} tokens of width {options.hidden_size:,} in 4 sequences, float32.
Medians of {options.rounds} rounds; a round times each router once.

<!-- no-run: takes minutes -->
```bash
python benchmarks/router_cost.py
```

| router | ms | beside `{CONTROL}` | share of the block's time |
|---|---|---|---|
{chr(10).join(rows)}

The whole block with `{CONTROL}` takes {1e3 * block:.0f} ms. Routers that pick other numbers of experts than {TOP_K} make the
experts cheaper or dearer, which this table leaves out; so it does the soft and merging routers, whose work is done with the
experts' weights.

Measured with {options.threads} thread on {describe_machine()}.
"""


if __name__ == "__main__":
    main()
