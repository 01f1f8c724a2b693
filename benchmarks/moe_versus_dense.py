"""MoE versus dense at equal active parameters and equal tokens, over several seeds: writes a page of docs/benchmarks.

    python benchmarks/moe_versus_dense.py --seeds 0 1 2

Both arms are those of `moesaic demo`. The runs are kept, so an interrupted comparison goes on where it was.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import torch

from moesaic.cli.demo import demo_run
from moesaic.files import atomic_file, write_text
from moesaic.layer.balance import max_violation
from moesaic.papers.machine import describe_machine
from moesaic.trace import account, record
from moesaic.train import TrainResult, load_model, overall, read_metrics
from moesaic.train.comparison import Comparison, compare

PAGE = Path("docs/benchmarks/moe-versus-dense.md")
ARMS = ("MoE", "dense")


@dataclass(frozen=True)
class Arm:
    """One trained model of one seed: final losses in nats, training time in seconds, and the curve of evaluations."""

    losses: dict[str, float]
    seconds: float
    tokens: int
    curve: list[tuple[int, float, float]]

    @classmethod
    def of(cls, result: TrainResult) -> Arm:
        """Read an arm's result and metrics."""
        seconds, curve, tokens = 0.0, [], 0
        for line in read_metrics(result.metrics_file):
            if line["type"] == "train":
                seconds += (line["tokens"] - tokens) / line["tokens_per_second"]
                tokens = line["tokens"]
            else:
                curve.append((tokens, seconds, _validation_loss(line)))
        losses = {domain: found.loss for domain, found in result.validation.items()}
        return cls({**losses, "all": overall(result.validation).loss}, seconds, result.tokens, curve)


def _validation_loss(line: dict[str, Any]) -> float:
    domains = line["domains"].values()
    return sum(domain["loss"] * domain["tokens"] for domain in domains) / sum(domain["tokens"] for domain in domains)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("runs/moe-versus-dense"))
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="a.b=VALUE")
    options = parser.parse_args()
    comparisons = [_run(seed, options.output / f"seed-{seed}", options.overrides) for seed in options.seeds]
    arms = {
        "MoE": [Arm.of(comparison.moe) for comparison in comparisons],
        "dense": [Arm.of(comparison.dense) for comparison in comparisons if comparison.dense],
    }
    command = " ".join(
        ["python benchmarks/moe_versus_dense.py --seeds", *map(str, options.seeds)]
        + [f"--set {override}" for override in options.overrides]
    )
    _plot(arms, PAGE.with_suffix(".svg"))
    write_text(PAGE, _page(arms, comparisons, options.seeds, command))
    print(PAGE.read_text(encoding="utf-8"))


def _run(seed: int, folder: Path, overrides: list[str]) -> Comparison:
    run = demo_run([*overrides, f"train.seed={seed}", f"data.seed={seed}", "train.eval_every=50"])
    comparison = compare(run, folder)
    if comparison.dense is None or not comparison.dense.finished:
        raise SystemExit("interrupted; the same command goes on from here")
    return comparison


def _plot(arms: dict[str, list[Arm]], path: Path) -> None:
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "moesaic"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    for (name, runs), colour in zip(arms.items(), ("#1f6fb4", "#c2571a"), strict=True):
        for index, arm in enumerate(runs):
            tokens, seconds, losses = zip(*arm.curve, strict=True)
            label = name if index == 0 else None
            axes[0].plot([count / 1e3 for count in tokens], losses, color=colour, label=label, alpha=0.8)
            axes[1].plot(seconds, losses, color=colour, alpha=0.8)
    axes[0].set(xlabel="thousand tokens", ylabel="validation loss (nats)")
    axes[1].set(xlabel="training time (s)")
    axes[0].legend(frameon=False)
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="svg", metadata={"Date": None})


def _page(arms: dict[str, list[Arm]], comparisons: list[Comparison], seeds: list[int], command: str) -> str:
    first = comparisons[0]
    assert first.dense is not None
    models = {"MoE": load_model(first.moe.checkpoint), "dense": load_model(first.dense.checkpoint)}
    counts = {name: account(model) for name, model in models.items()}
    rows = []
    for domain in arms["MoE"][0].losses:
        means = {name: [arm.losses[domain] for arm in runs] for name, runs in arms.items()}
        differences = [moe - dense for moe, dense in zip(means["MoE"], means["dense"], strict=True)]
        cells = [_spread(means[name]) for name in ARMS] + [_spread(differences, signed=True)]
        rows.append(f"| validation loss, {domain} | {' | '.join(cells)} |")
    speeds = {name: [arm.tokens / arm.seconds for arm in runs] for name, runs in arms.items()}
    ratio = [moe / dense for moe, dense in zip(speeds["MoE"], speeds["dense"], strict=True)]
    times = {name: _spread([arm.seconds for arm in runs], digits=0) for name, runs in arms.items()}
    better = statistics.mean(
        moe.losses["all"] - dense.losses["all"] for moe, dense in zip(arms["MoE"], arms["dense"], strict=True)
    )
    at_time = [_loss_at(dense, moe) for dense, moe in zip(arms["dense"], arms["MoE"], strict=True)]
    return f"""# MoE versus dense

A fine-grained MoE with shared experts and a dense model of equal active width, given the same tokens of Python's
documentation and standard library in the same order. It is the comparison of `moesaic demo`, over {len(seeds)} seeds
(weights and order of the data); the run is `src/moesaic/cli/demo.yaml`.

<!-- no-run: trains for many minutes -->
```bash
{command}
```

| | MoE | dense | difference |
|---|---|---|---|
{chr(10).join(rows)}
| parameters | {counts["MoE"].total:,} | {counts["dense"].total:,} | |
| active for a token | {counts["MoE"].active:,} | {counts["dense"].active:,} | |
| tokens | {arms["MoE"][0].tokens:,} | {arms["dense"][0].tokens:,} | |
| training time, s | {times["MoE"]} | {times["dense"]} | |
| tokens/s | {_spread(speeds["MoE"], digits=0)} | {_spread(speeds["dense"], digits=0)} | x {_spread(ratio, digits=2)} |
| MaxVio, mean over layers | {_imbalance(models["MoE"], first):.2f} | | |

Losses are in nats for a token: mean ± standard deviation over seeds, differences paired by seed. Time is that of
training steps, without evaluation and checkpoints.

![Validation loss over tokens and over training time](moe-versus-dense.svg)

At equal tokens the MoE's loss is {abs(better):.3f} nats {"lower" if better < 0 else "higher"}. In the time that the dense
model takes for all of its tokens, the MoE gets to {_spread(at_time)} (interpolated between evaluations), where the dense
model ends at {_spread([arm.losses["all"] for arm in arms["dense"]])}. There the MoE's learning rate has not decayed yet, so
that figure is higher than what a run planned for that time would reach.

Measured with {torch.get_num_threads()} threads on {describe_machine()}.
"""


def _loss_at(dense: Arm, moe: Arm) -> float:
    """The MoE's validation loss at the time when the dense arm ends, or its last one if it ends sooner."""
    points = [(seconds, loss) for _, seconds, loss in moe.curve]
    for (start, high), (end, low) in itertools.pairwise(points):
        if start <= dense.seconds <= end:
            return high + (low - high) * (dense.seconds - start) / (end - start)
    return points[-1][1]


def _imbalance(model: Any, comparison: Comparison) -> float:
    with torch.no_grad(), record(model, keep="counts") as trace:
        for batches in comparison.data.validation_batches().values():
            model(input_ids=batches[0]["input_ids"], use_cache=False)
    return statistics.mean(float(max_violation(layer.load_N)) for layer in trace.layers.values())


def _spread(values: list[float], *, digits: int = 4, signed: bool = False) -> str:
    mean = f"{statistics.mean(values):{'+' if signed else ''}.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


if __name__ == "__main__":
    main()
