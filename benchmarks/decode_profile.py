"""Where the time of a decoded token goes, part by part: writes docs/benchmarks/decode-profile.md.

    python benchmarks/decode_profile.py --threads 1

The model is the same for all arms: 8 layers of Qwen3-MoE, random bfloat16 weights, batch 1, greedy `generate` after a
short prompt. Every module's forward is timed, less that of the modules inside it, so that the parts add up.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import moesaic
from moesaic.files import write_text
from moesaic.infer.decode import fast_decoding
from moesaic.papers.machine import describe_machine

PAGE = Path("docs/benchmarks/decode-profile.md")
CONFIG = {
    "vocab_size": 8192,
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "moe_intermediate_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
PARTS = (
    "experts",
    "dense projections",
    "head",
    "router",
    "norms",
    "rope, cache, attention",
    "MoE block around router and experts",
    "decoder layer around its modules, or as a whole",
    "model around its layers",
    "loop of generate",
)


def stock_model() -> Qwen3MoeForCausalLM:
    """The model with random bfloat16 weights."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        return Qwen3MoeForCausalLM(Qwen3MoeConfig(**CONFIG)).eval()
    finally:
        torch.set_default_dtype(torch.float32)


def bytes_read(config: Qwen3MoeConfig) -> dict[str, int]:
    """Weights in bytes that one token reads, by part; the embedding's row and the norms are left out."""
    layers, width = config.num_hidden_layers, config.hidden_size
    heads = 2 * config.num_attention_heads + 2 * config.num_key_value_heads
    return {
        "experts": 2 * layers * config.num_experts_per_tok * 3 * width * config.moe_intermediate_size,
        "dense projections": 2 * layers * heads * config.head_dim * width,
        "head": 2 * config.vocab_size * width,
        "router": 2 * layers * config.num_experts * width,
    }


def part_of(name: str, module: nn.Module) -> str:
    """Which part of PARTS a module's own time belongs to."""
    kind, last = type(module).__name__, name.rpartition(".")[2]
    if name == "lm_head":
        return "head"
    if last == "experts":
        return "experts"
    if last == "gate":
        return "router"
    if isinstance(module, nn.Linear):
        return "dense projections"
    if kind.endswith("RMSNorm"):
        return "norms"
    if last == "self_attn":
        return "rope, cache, attention"
    if last == "mlp":
        return "MoE block around router and experts"
    if last.isdigit():
        return "decoder layer around its modules, or as a whole"
    return "model around its layers"


@dataclass
class Clock:
    """Own time of each part over the steps after the prompt.

    Attributes:
        seconds: by part.
        steps: forward passes of the model, the prompt's included.
        started: when the first pass ended.
    """

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    steps: int = 0
    started: float = 0.0
    _inside: list[float] = field(default_factory=lambda: [0.0])

    def timed(self, part: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        """`forward` on the account of `part`."""

        @functools.wraps(forward)
        def run(*args: Any, **kwargs: Any) -> Any:
            return self._run(part, forward, *args, **kwargs)

        return run

    def _run(self, part: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._inside.append(0.0)
        begun = time.perf_counter()
        result = forward(*args, **kwargs)
        taken = time.perf_counter() - begun
        self.seconds[part] += taken - self._inside.pop()
        self._inside[-1] += taken
        if len(self._inside) == 1:
            self.steps += 1
            if self.steps == 1:
                self.seconds = dict.fromkeys(PARTS, 0.0)
                self._inside = [0.0]
                self.started = time.perf_counter()
        return result

    def stop(self) -> dict[str, float]:
        """Milliseconds a token by part, when the last token has come."""
        total = time.perf_counter() - self.started
        self.seconds["loop of generate"] = total - self._inside[0]
        return {part: 1e3 * taken / (self.steps - 1) for part, taken in self.seconds.items()}


@contextmanager
def clocked(model: nn.Module) -> Iterator[Clock]:
    """Time every module of `model` inside."""
    clock = Clock()
    modules = [(name, module) for name, module in model.named_modules() if not isinstance(module, nn.ModuleList)]
    for name, module in modules:
        module.forward = clock.timed(part_of(name, module), module.forward)
    try:
        yield clock
    finally:
        for _, module in modules:
            del module.forward


def generate(model: Any, prompt_BS: Tensor, tokens: int) -> Tensor:
    """Greedy continuation."""
    return model.generate(
        prompt_BS,
        attention_mask=torch.ones_like(prompt_BS),
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
    )


def whole(model: Any, prompt_BS: Tensor, tokens: int) -> float:
    """Milliseconds a token without any clock inside, the prompt left out."""
    begun = time.perf_counter()
    generate(model, prompt_BS, 1)
    prompt = time.perf_counter() - begun
    begun = time.perf_counter()
    generate(model, prompt_BS, tokens + 1)
    return 1e3 * (time.perf_counter() - begun - prompt) / tokens


Arm = tuple[Any, Callable[[], AbstractContextManager[Any]]]


def bandwidth() -> float:
    """Bytes a second at which torch adds up a tensor of 1 GB."""
    numbers = torch.ones(2**28)
    times = []
    for _ in range(5):
        begun = time.perf_counter()
        numbers.sum()
        times.append(time.perf_counter() - begun)
    return 4 * numbers.numel() / min(times)


def arms(names: list[str]) -> dict[str, Arm]:
    """Each arm's model, and what its turn runs in; the arms are transformers' own experts implementations, and

    moesaic: our model of the same weights.
    fast, fast moesaic: the stock model and ours under `moesaic.fast_decoding`.
    """
    stock, found = stock_model(), {}
    ours = moesaic.convert(stock) if any("moesaic" in name for name in names) else None
    for name in names:
        model = ours if "moesaic" in name else stock
        if name.startswith("fast"):
            found[name] = (model, partial(fast_decoding, model))
        elif name == "moesaic":
            found[name] = (model, nullcontext)
        else:
            found[name] = (model, partial(_implementation, stock, name))
    return found


@contextmanager
def _implementation(model: Any, name: str) -> Iterator[None]:
    before = model.config._experts_implementation
    model.set_experts_implementation(name)
    yield
    model.set_experts_implementation(before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", default=["eager", "grouped_mm", "moesaic", "fast", "fast moesaic"])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="write the page as well as print it")
    options = parser.parse_args()
    prompt_BS = torch.randint(5, CONFIG["vocab_size"], (1, 16), generator=torch.Generator().manual_seed(0))
    models = arms(options.arms)
    tables = []
    for threads in options.threads:
        torch.set_num_threads(threads)
        parts: dict[str, list[dict[str, float]]] = {name: [] for name in models}
        wholes: dict[str, list[float]] = {name: [] for name in models}
        for turn in range(options.rounds + 1):
            for name, (model, turned_on) in models.items():
                with turned_on():
                    generate(model, prompt_BS, 4)
                    if turn == 0:
                        continue
                    wholes[name].append(whole(model, prompt_BS, options.tokens))
                    with clocked(model) as clock:
                        generate(model, prompt_BS, options.tokens + 1)
                        parts[name].append(clock.stop())
        tables.append(render(threads, parts, wholes, bandwidth()))
    page = "\n".join([*tables, f"Measured on {describe_machine()}.", ""])
    print(page)
    if options.write:
        write_text(PAGE, HEAD + page)


HEAD = """# Where the time of a token goes

Milliseconds for each part of a decoded token, from the timed forward of every module less that of the modules inside it.
`eager` and `grouped_mm` are transformers' experts implementations; `moesaic` is our model with the same weights as it is;
`fast` is the stock model and `fast moesaic` ours under [`moesaic.fast_decoding`](../decoding-speed.md), where a decoder
layer is two native calls and so one part. The model has 8 layers of width 1,024 with 64 experts of width 512, 8 of them for
each token, 16 heads of 64 and 4 of keys and values, and a vocabulary of 8,192; random bfloat16 weights, batch 1, greedy
`generate` after a prompt of 16 tokens. Medians; the arms take turns.

<!-- no-run: takes minutes -->
```bash
python benchmarks/decode_profile.py --write
```

"Read once" is the time of reading the weights at the bandwidth that torch reaches when it adds up a large tensor.

"""


def render(
    threads: int, parts: dict[str, list[dict[str, float]]], wholes: dict[str, list[float]], bandwidth: float
) -> str:
    sizes = bytes_read(Qwen3MoeConfig(**CONFIG))
    lines = [f"## {threads} thread{'s' if threads > 1 else ''}", ""]
    lines += [f"| ms a token | MB read | {' | '.join(parts)} |", "|" + "---|" * (len(parts) + 2)]
    for part in PARTS:
        times = [statistics.median(found[part] for found in parts[name]) for name in parts]
        size = f"{sizes[part] / 1e6:.1f}" if part in sizes else ""
        lines.append(f"| {part} | {size} | {' | '.join(f'{taken:.2f}' for taken in times)} |")
    sums = [statistics.median(sum(found.values()) for found in parts[name]) for name in parts]
    lines.append(f"| sum, clocks included | {sum(sizes.values()) / 1e6:.1f} | {' | '.join(f'{x:.2f}' for x in sums)} |")
    medians = [statistics.median(wholes[name]) for name in parts]
    lines.append(f"| without clocks | | {' | '.join(f'{taken:.2f}' for taken in medians)} |")
    lines.append(f"| tokens/s | | {' | '.join(f'{1e3 / taken:.1f}' for taken in medians)} |")
    floor = sum(sizes.values()) / bandwidth
    lines.append(f"| read once at {bandwidth / 1e9:.1f} GB/s | | {' | '.join(f'{1e3 * floor:.2f}' for _ in parts)} |")
    shares = [1e3 * floor / taken for taken in medians]
    lines.append(f"| share of that bandwidth | | {' | '.join(f'{share:.0%}' for share in shares)} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
