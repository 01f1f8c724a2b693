"""How long each decoding takes beside greedy decoding, as the median of interleaved repeats."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moesaic.infer.consistency import PromptBatch
from moesaic.infer.consistency.sample import pad_of
from moesaic.infer.decode.decodings import SelfContrast
from moesaic.infer.decode.overrides import override_routing
from moesaic.infer.tasks import Task
from moesaic.papers.scmoe_decodings import CONTRAST, DEFAULT, DYNAMIC, ENSEMBLE, GREEDY, Setting, fixed, settings
from moesaic.papers.scmoe_options import MeasureOptions, Routed

TWO_PASSES = f"{CONTRAST} in two passes"
"""The slower plan of self-contrast."""


def timed(routed: Routed, options: MeasureOptions, amateur: PreTrainedModel | str | None) -> dict[str, Setting]:
    """One setting of each method: of ensemble and dynamic routing one expert more than trained and a threshold of 0.5, as in the
    paper's table 3, of self-contrast the fixed one, of others the middle of their grid."""
    weak, beta = fixed(routed, options)
    grids = settings(routed, options, amateur)
    found = {method: grid[len(grid) // 2] for method, grid in grids.items() if method not in (CONTRAST, DEFAULT)}
    more = min(routed.picks + 1, routed.experts)
    found[ENSEMBLE] = Setting(f"k={more}", f"k={more}")
    found[DYNAMIC] = Setting("threshold 0.5", "dynamic=0.5")
    for name, plan in ((CONTRAST, "two_rows"), (TWO_PASSES, "two_passes")):
        strategy = SelfContrast.from_dict({"weak": weak, "beta": beta, "alpha": options.alpha, "plan": plan})
        found[name] = Setting(f"{weak}, beta {beta:g}", strategy=strategy)
    return found


@torch.no_grad()
def latencies(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    routed: Routed,
    options: MeasureOptions,
    amateur: PreTrainedModel | None,
) -> dict[str, float]:
    """Time of each decoding, prompt included, for a fixed number of tokens.

    Returns:
        `latency.METHOD`, times that of greedy decoding, and `tokens_per_second.METHOD`, with `.bN` at the end for N rows where
        N is not the first of `latency_batches`. Empty if none is to be measured.
    """
    if not options.latency_tokens:
        return {}
    found = {}
    chosen = timed(routed, options, amateur)
    for place, rows in enumerate(options.latency_batches):
        batch = _batch(model, tokenizer, task, rows, options.latency_tokens)
        runs = {name: _run(model, setting, batch, options.latency_tokens) for name, setting in chosen.items()}
        for run in runs.values():
            run()  # whatever is made or looked up only once
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(options.latency_repeats):
            for name, run in runs.items():
                seconds[name].append(run())
        suffix = f".b{rows}" if place else ""
        # Paired by repeat: whatever else the machine does slows down all runs of a repeat.
        for name, own in seconds.items():
            ratios = [one / other for one, other in zip(own, seconds[GREEDY], strict=True)]
            found[f"latency.{name}{suffix}"] = statistics.median(ratios)
            found[f"tokens_per_second.{name}{suffix}"] = rows * options.latency_tokens / statistics.median(own)
    return found


def _batch(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task, rows: int, tokens: int
) -> PromptBatch:
    """The first prompts of a task, again and again if there are fewer than rows, cut on the left to the shortest's length."""
    prompts = [tokenizer(item.prompt)["input_ids"] for item in task.items.values()]
    chosen = [prompts[row % len(prompts)] for row in range(rows)]
    length = min(map(len, chosen))  # pyright: ignore[reportArgumentType]
    ids_BS = torch.tensor([ids[-length:] for ids in chosen], device=model.device)  # pyright: ignore[reportIndexIssue]
    return PromptBatch(ids_BS, torch.ones_like(ids_BS), tuple(range(rows)), tokens, None, pad_of(tokenizer))


def _run(model: PreTrainedModel, setting: Setting, batch: PromptBatch, tokens: int) -> Callable[[], float]:
    decoding = setting.generate(min_new_tokens=tokens)

    def run() -> float:
        _synchronize(model)
        begun = time.perf_counter()
        if setting.override:
            with override_routing(model, setting.override):
                out_BS = decoding(model, batch)
        else:
            out_BS = decoding(model, batch)
        _synchronize(model)
        assert out_BS.shape[1] == batch.input_ids_BS.shape[1] + tokens
        return time.perf_counter() - begun

    return run


def _synchronize(model: PreTrainedModel) -> None:
    if model.device.type != "cpu":
        torch.accelerator.synchronize(model.device)
