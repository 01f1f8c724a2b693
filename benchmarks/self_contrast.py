"""What self-contrast decoding costs beside greedy decoding: writes docs/benchmarks/self-contrast.md.

    python benchmarks/self_contrast.py --model ours --dtype bfloat16
    python benchmarks/self_contrast.py --write

Models have random weights. `generate` runs whole: transformers' loop, contrast and all. Greedy decoding, the two-row plan and
the two-pass plan take turns on the same model under `moesaic.fast_decoding`, and every token is timed by a streamer. The floor
is the time of reading the weights in use once, or of multiplying with them if that takes longer; which experts are in use is
counted from the routing of the very tokens.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from decode_profile import CONFIG
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.generation.streamers import BaseStreamer

import moesaic
from moesaic.bench.rates import Rates, measure_rates
from moesaic.files import write_text
from moesaic.hf.weight_sizes import weight_sizes
from moesaic.infer.decode.cost import Work
from moesaic.infer.decode.counting import count_work
from moesaic.papers.machine import describe_machine

PAGE = Path("docs/benchmarks/self-contrast.md")
# Larger than usual, so that layers change what they are given: else strong and weak rows would have the same experts.
_SHAPE = {**CONFIG, "initializer_range": 0.1}
MIXTRAL = {**_SHAPE, "intermediate_size": 2048, "num_local_experts": 8, "num_experts": 8, "num_experts_per_tok": 2}
MODELS = {
    "ours": "moesaic, 64 experts of 512, top 8",
    "qwen3_moe": "Qwen3-MoE of transformers, the same weights",
    "mixtral": "Mixtral of transformers, 8 experts of 2,048, top 2",
}
ARMS = ("greedy", "two_rows", "two_passes")
PROMPT = 16


@dataclass(frozen=True)
class Cell:
    """One comparison.

    Attributes:
        model: of MODELS.
        dtype: of its weights.
        threads: of torch.
        batch: prompts.
        milliseconds: median for a token of every prompt, by arm, of each round.
        bytes: of weights that a step reads, by arm.
        experts: distinct experts of a step in a layer, by arm.
        floor: milliseconds of a step, by arm, at the rates of the machine just then.
        bandwidth: of these, bytes a second.
        bound: what sets the floor of the two-row plan, "memory" or "arithmetic".
    """

    model: str
    dtype: str
    threads: int
    batch: int
    milliseconds: dict[str, list[float]]
    bytes: dict[str, float]
    experts: dict[str, float]
    floor: dict[str, float]
    bandwidth: float
    bound: str

    def median(self, arm: str) -> float:
        """Milliseconds."""
        return statistics.median(self.milliseconds[arm])

    def ratio(self, arm: str) -> float:
        """Of its time to that of greedy decoding, the median of those of the rounds."""
        pairs = zip(self.milliseconds[arm], self.milliseconds["greedy"], strict=True)
        return statistics.median(taken / greedy for taken, greedy in pairs)


class Stopwatch(BaseStreamer):
    """When tokens came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass

    @property
    def milliseconds(self) -> float:
        """Of a token, the median without the first ones, for which the prompt is read and memory made."""
        steps = [after - before for before, after in zip(self.times[3:], self.times[4:], strict=False)]
        return 1e3 * statistics.median(steps)


def build(name: str, dtype: torch.dtype) -> PreTrainedModel:
    """A model of MODELS with random weights."""
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        if name == "mixtral":
            return MixtralForCausalLM(MixtralConfig(**MIXTRAL)).eval()
        stock = Qwen3MoeForCausalLM(Qwen3MoeConfig(**_SHAPE)).eval()
        return moesaic.convert(stock) if name == "ours" else stock
    finally:
        torch.set_default_dtype(torch.float32)


def run(model: Any, arm: str, prompt_BS: Tensor, tokens: int, streamer: BaseStreamer | None = None) -> Tensor:
    """Continue prompts by so many tokens."""
    options: dict[str, Any] = {
        "attention_mask": torch.ones_like(prompt_BS),
        "max_new_tokens": tokens,
        "min_new_tokens": tokens,
        "do_sample": False,
        "streamer": streamer,
    }
    if arm == "greedy":
        return model.generate(prompt_BS, **options)
    plan = "two_rows" if arm == "two_rows" else "two_passes"
    return moesaic.SelfContrast(plan=plan, beta=0.5).generate(model, prompt_BS, **options)


def step_work(model: Any, arm: str, prompt_BS: Tensor, tokens: int) -> Work:
    """What a step computes, the prompt left out."""
    works = []
    for number in (1, tokens):
        with count_work(model) as count:
            run(model, arm, prompt_BS, number)
        works.append(count.work)
    return (works[1] - works[0]).scaled(1 / (tokens - 1))


def floor_of(model: PreTrainedModel, arm: str, work: Work, batch: int, rates: Rates) -> tuple[float, str]:
    """Milliseconds of a step at these rates, and what sets them."""
    sizes, size = weight_sizes(model), model.dtype.itemsize
    top_k = (
        int(model.config.get_text_config().num_experts_per_tok) if hasattr(model.config, "num_experts_per_tok") else 0
    )
    top_k = top_k or int(model.config.spec.router.top_k)
    picks = top_k if arm == "greedy" else top_k + 1  # rank 2 is one expert
    rows = 1 if arm == "greedy" else 2
    flops = 2 * batch * (rows * sizes.shared + picks * sizes.per_expert) / size
    memory, arithmetic = work.weight_bytes / rates.bandwidth, flops / rates.gemm
    return 1e3 * max(memory, arithmetic), "memory" if memory >= arithmetic else "arithmetic"


def measure(model: PreTrainedModel, name: str, threads: int, batch: int, options: argparse.Namespace) -> Cell:
    """All arms, taking turns."""
    torch.set_num_threads(threads)
    vocabulary = int(model.config.get_text_config().vocab_size)
    prompt_BS = torch.randint(5, vocabulary, (batch, PROMPT), generator=torch.Generator().manual_seed(batch))
    work = {arm: step_work(model, arm, prompt_BS, options.tokens) for arm in ARMS}
    milliseconds: dict[str, list[float]] = {arm: [] for arm in ARMS}
    before = measure_rates(model.dtype, "cpu", quick=True)
    with moesaic.fast_decoding(model):
        for turn in range(options.rounds + 1):
            for arm in ARMS:
                watch = Stopwatch()
                run(model, arm, prompt_BS, options.tokens if turn else 4, watch)
                if turn:
                    milliseconds[arm].append(watch.milliseconds)
    rates = before.between(measure_rates(model.dtype, "cpu", quick=True))
    floors = {arm: floor_of(model, arm, work[arm], batch, rates) for arm in ARMS}
    return Cell(
        name,
        str(model.dtype).removeprefix("torch."),
        threads,
        batch,
        milliseconds,
        {arm: found.weight_bytes for arm, found in work.items()},
        {arm: found.experts_per_layer * found.passes / work["greedy"].passes for arm, found in work.items()},
        {arm: floor for arm, (floor, _) in floors.items()},
        rates.bandwidth,
        floors["two_rows"][1],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), nargs="*", default=[])
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, default=Path("runs/self-contrast"), help="folder of the numbers")
    parser.add_argument("--note", default="", help="a sentence about the circumstances, for the page")
    parser.add_argument("--write", action="store_true", help="write the page of all numbers in --output")
    options = parser.parse_args()
    for name in options.model:
        for dtype in options.dtype:
            model = build(name, getattr(torch, dtype))
            for batch in options.batch:
                for threads in options.threads:
                    cell = measure(model, name, threads, batch, options)
                    path = options.output / f"{name}-{dtype}-t{threads}-b{batch}.json"
                    write_text(path, json.dumps({**asdict(cell), "machine": describe_machine()}, indent=1) + "\n")
                    print("\n".join(rows_of([cell])), flush=True)
            del model
            gc.collect()
    if options.write:
        # Of all that is in --output, so that a long measurement can be made in parts.
        write_text(PAGE, render(list(cells_in(options.output)), options.note))


def cells_in(folder: Path) -> Iterator[tuple[Cell, str]]:
    """What was measured, and on what."""
    for name in MODELS:
        for path in sorted(folder.glob(f"{name}-*.json"), key=lambda path: path.stem):
            found = json.loads(path.read_text(encoding="utf-8"))
            machine = found.pop("machine")
            yield Cell(**found), machine


HEAD = """# What self-contrast costs

Self-contrast (`moesaic.SelfContrast`) runs each token twice: with the model's own routing, and with a weak one, here the
second expert alone. Its two-row plan runs both as rows of one batch and reads what they share once; its two-pass plan runs one
after the other. Both and greedy decoding are timed under [`fast_decoding`](../decoding-speed.md), as `generate` runs them, with
transformers' loop and the contrast of the logits in float32.

Models have 8 layers of width 1,024, 16 heads of 64 and 4 of keys and values, and a vocabulary of 8,192, with random weights
of standard deviation 0.1, with which strong and weak rows part; prompts of 16 tokens. Times are medians over tokens and rounds, in which the three take turns; ratios are medians of those
of the rounds.

<!-- no-run: takes minutes -->
```bash
python benchmarks/self_contrast.py --model ours qwen3_moe mixtral --write
```

**Floor.** A step can't take less than reading the weights in use once, or multiplying with them if that takes longer. Bytes
are those of all weights but the embedding, with each expert that some row picked counted once a pass; which those
are is counted from the routing of the same tokens. The floor of a plan is its bytes over those of greedy decoding where memory
sets both. Keys and values, activations and Python are not in it.
"""


def render(found: list[tuple[Cell, str]], note: str) -> str:
    """The page."""
    parts = [HEAD]
    for name, title in MODELS.items():
        cells = [cell for cell, _ in found if cell.model == name]
        if cells:
            parts += [f"## {title}", "", *HEADER, *rows_of(sorted(cells, key=_order)), ""]
    machines = sorted({machine for _, machine in found})
    return "\n".join([*parts, *(f"Measured on {machine}." for machine in machines), *filter(None, [note]), ""])


def _order(cell: Cell) -> tuple[int, str, int]:
    return cell.batch, cell.dtype, cell.threads


HEADER = (
    "| prompts | dtype | threads | greedy, ms | two rows, ms | ratio | floor | two passes, ms | ratio | floor | "
    "experts a layer: greedy, two rows, two passes | MB read: greedy, two rows, two passes | share of the floor, two rows |",
    "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
)


def rows_of(cells: list[Cell]) -> list[str]:
    """Of the table."""
    per_arm: Callable[[dict[str, float], str], str] = lambda values, form: ", ".join(  # noqa: E731
        format(values[arm], form) for arm in ARMS
    )
    lines = []
    for cell in cells:
        columns = [str(cell.batch), cell.dtype, str(cell.threads), f"{cell.median('greedy'):.2f}"]
        for arm in ARMS[1:]:
            columns += [
                f"{cell.median(arm):.2f}",
                f"**{cell.ratio(arm):.2f}**",
                f"{cell.floor[arm] / cell.floor['greedy']:.2f}",
            ]
        share = cell.floor["two_rows"] / cell.median("two_rows")
        columns += [
            per_arm(cell.experts, ".1f"),
            per_arm({arm: size / 1e6 for arm, size in cell.bytes.items()}, ".0f"),
            f"{share:.0%} ({cell.bound}, {cell.bandwidth / 1e9:.0f} GB/s)",
        ]
        lines.append(f"| {' | '.join(columns)} |")
    return lines


if __name__ == "__main__":
    main()
