"""What recording costs beside a forward pass: our model and a stock one, to memory and to disk.

    python benchmarks/trace_overhead.py --model ours
    python benchmarks/trace_overhead.py --model stock --json

Two measures. Whole: a round times a forward pass in each way once, in turns, so that a busy moment of the machine falls on
all of them; to disk that is a whole `with record(...)` block, with the thread, the file and its last byte on disk. Alone:
what recording itself does for one forward pass, without the forward pass, so that the noise of the latter is not in it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3MoeConfig

import moesaic
from moesaic.hf.routing_source import routing_source
from moesaic.hf.stock_routing import StockRouter
from moesaic.layer import Routing, RoutingContext
from moesaic.papers.machine import describe_machine
from moesaic.trace import TraceFile, record

SIZES: dict[str, Any] = {
    "hidden_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 8192,
    "max_position_embeddings": 2048,
}
NUM_EXPERTS, TOP_K, EXPERT_SIZE = 64, 8, 256
ALONE: dict[str, dict[str, Any]] = {
    "all": {},
    "a tenth of the documents": {"sample": 0.1},
    "with scores": {"scores": True},
}
PASSES = 20


def model_of(kind: str) -> PreTrainedModel:
    """A random model in evaluation mode."""
    torch.manual_seed(0)
    if kind == "ours":
        backbone = {"model_type": "qwen3", "intermediate_size": 1024, **SIZES}
        experts = {"num_experts": NUM_EXPERTS, "intermediate_size": EXPERT_SIZE}
        return moesaic.build(backbone, {"experts": experts, "router": {"top_k": TOP_K}}).eval()
    config = Qwen3MoeConfig(
        **SIZES, num_experts=NUM_EXPERTS, num_experts_per_tok=TOP_K, moe_intermediate_size=EXPERT_SIZE
    )
    return AutoModelForCausalLM.from_config(config, experts_implementation="moesaic").eval()


def measure(kind: str, *, rounds: int, forwards: int, batch: int, length: int) -> dict[str, Any]:
    """Medians by way of recording, in seconds a forward pass, and what a row takes on disk."""
    model = model_of(kind)
    ids = torch.randint(SIZES["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(1))
    with tempfile.TemporaryDirectory() as folder:
        number = iter(range(10**6))

        def to_disk(**options: Any) -> AbstractContextManager[Any]:
            return record(model, Path(folder) / str(next(number)), **options)

        ways: dict[str, Callable[[], AbstractContextManager[Any]]] = {
            "not recorded": nullcontext,
            "to memory": lambda: record(model),
            "to disk": to_disk,
        }
        times: dict[str, list[float]] = {name: [] for name in ways}
        for round_number in range(rounds + 1):
            for name, way in ways.items():
                started = time.perf_counter()
                with torch.no_grad(), way():
                    for _ in range(forwards):
                        model.model(ids)
                if round_number:  # the first one warms up
                    times[name].append((time.perf_counter() - started) / forwards)
        with torch.no_grad():
            alone = {name: cost_alone(model, ids, Path(folder) / name, **options) for name, options in ALONE.items()}
        trace = TraceFile(Path(folder) / "0")
        size = sum(part.path.stat().st_size for part in trace.parts)
        rows = len(trace)
    medians = {name: statistics.median(found) for name, found in times.items()}
    plain = times["not recorded"]
    overheads = {
        name: statistics.median(one / other - 1 for one, other in zip(found, plain, strict=True))
        for name, found in times.items()
    }
    return {
        "model": kind,
        "seconds": medians,
        "overhead": overheads,
        "alone": alone,
        "bytes_per_row": size / rows,
        "rows_per_forward": rows // forwards,
        "machine": describe_machine(),
    }


def cost_alone(model: PreTrainedModel, ids: Tensor, path: Path, **options: Any) -> dict[str, float]:
    """Seconds a forward pass until all is on disk, and those in which what stock routers returned is read."""
    contexts: list[RoutingContext] = []
    reading: list[float] = []
    read = StockRouter.read

    def timed(*args: Any) -> Routing:
        started = time.perf_counter()
        routing = read(*args)
        reading[-1] += time.perf_counter() - started
        return routing

    StockRouter.read = timed  # type: ignore[method-assign]
    try:
        handle = routing_source(model).listen(contexts.append)
        for _ in range(3):
            reading.append(0.0)
            model.model(ids)
        handle.remove()
    finally:
        StockRouter.read = read  # type: ignore[method-assign]
    with record(model, path, **options) as trace:
        trace.add(contexts[0])
        trace.finish_part()
        started = time.perf_counter()
        for _ in range(PASSES):
            trace.add(contexts[0])
        trace.finish_part()
        total = time.perf_counter() - started
    routers = statistics.median(reading)
    return {"total": routers + total / PASSES, "routers": routers}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("ours", "stock"), default="ours")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--forwards", type=int, default=3)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    result = measure(
        arguments.model,
        rounds=arguments.rounds,
        forwards=arguments.forwards,
        batch=arguments.batch,
        length=arguments.length,
    )
    if arguments.json:
        print(json.dumps(result, indent=2))
        return
    plain = result["seconds"]["not recorded"]
    for name, found in result["alone"].items():
        share = 100 * found["total"] / plain
        print(
            f"alone, {name:29} {1000 * found['total']:8.1f} ms a forward  {share:5.1f} %, of which stock routers "
            f"{1000 * found['routers']:.1f} ms"
        )
    for name, seconds in result["seconds"].items():
        print(f"{name:36} {1000 * seconds:8.1f} ms a forward  {100 * result['overhead'][name]:+5.1f} %")
    print(f"{result['rows_per_forward']} rows a forward, {result['bytes_per_row']:.1f} bytes a row on disk")
    print(result["machine"])


if __name__ == "__main__":
    main()
