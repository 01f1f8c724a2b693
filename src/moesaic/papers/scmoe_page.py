"""Tables and figures of the SCMoE reproduction, from the measurements of `scmoe_measure`."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from moesaic.infer.tasks.statistics import mcnemar
from moesaic.papers.claims import Measured
from moesaic.papers.experiment import Section
from moesaic.papers.page import spread
from moesaic.papers.reproduce import Reproduction
from moesaic.papers.result import ArmResult
from moesaic.papers.scmoe_decodings import CONTRAST, DEFAULT, ENSEMBLE, GREEDY, STRONGER, TITLES, Setting, settings
from moesaic.papers.scmoe_latency import TWO_PASSES, timed
from moesaic.papers.scmoe_measure import CONTRASTED, PLAIN
from moesaic.papers.scmoe_options import MeasureOptions, Routed

PAPER_KL = (0.17, 5.05, 10.21, 12.81, 15.80, 17.78, 19.47, 25.36)
"""Table 5, Mixtral on GSM8K by rank, times 1e5; a random expert has 10.36 and Mistral-7B 0.25."""

PAPER_UNCHOSEN = (2.81, 46.21, 72.62, 80.54, 84.61, 87.79, 90.44, 90.96)
"""Table 6, by rank, in percent."""

PAPER_EXPERTS = (45.19, 61.79, 63.84, 62.93, 62.02, 59.14, 57.32, 57.70)
"""Table 7, accuracy on GSM8K by number of experts."""


def results(found: Reproduction, arm: str) -> list[ArmResult]:
    """Those of an arm by seed."""
    return [found.results[seed][arm] for seed in found.seeds]


def values(found: Reproduction, arm: str, name: str) -> list[float]:
    """A measurement of an arm by seed; empty where it was not measured."""
    return [result.measurements[name] for result in results(found, arm) if name in result.measurements]


def grids(result: ArmResult) -> Mapping[str, Sequence[Setting]]:
    """The settings that were tried of each method."""
    options, routed = _options(result), _routed(result)
    return settings(routed, options, "amateur" if "amateur" in result.measurements else None)


def _options(result: ArmResult) -> MeasureOptions:
    return MeasureOptions.from_dict(result.run.get("measure", {}))


def _routed(result: ArmResult) -> Routed:
    return Routed(int(result.measurements["experts"]), int(result.measurements["trained_picks"]))


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in (head, *rows)]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])


def _decodings(found: Reproduction) -> str:
    rows = []
    for arm in found.arms:
        first, *_ = results(found, arm)
        for method, grid in grids(first).items():
            name = f"accuracy.{method}"
            if len(values(found, arm, name)) < len(found.seeds):
                continue
            gained, lost = (
                [round(value) for value in values(found, arm, f"{kind}.{method}")] for kind in ("gained", "lost")
            )
            differences = [
                one - other
                for one, other in zip(values(found, arm, name), values(found, arm, f"accuracy.{GREEDY}"), strict=True)
            ]
            paired = (
                ("", "", "")
                if method == GREEDY
                else (
                    spread(differences, 2, signed=True),
                    f"+{sum(gained)} -{sum(lost)}",
                    f"{mcnemar(sum(gained), sum(lost)):.3f}",
                )
            )
            chosen = [grid[int(place)].label for place in values(found, arm, f"chosen.{method}")] or [grid[0].label]
            seconds = spread(values(found, arm, f"latency.{CONTRAST if method == DEFAULT else method}"), 2)
            text = "; ".join(dict.fromkeys(chosen))
            rows.append((f"`{arm}`", TITLES[method], text, spread(values(found, arm, name), 1), *paired, seconds))
    head = (
        "arm",
        "decoding",
        "setting, chosen on the development split",
        "accuracy, %",
        "to greedy, points",
        "gained, lost",
        "McNemar's p",
        "time / greedy",
    )
    return _table(head, rows)


def _kinds(found: Reproduction) -> str:
    rows, kinds = [], []
    for arm in found.arms:
        prefix = f"accuracy.{GREEDY}."
        kinds = [name.removeprefix(prefix) for name in results(found, arm)[0].measurements if name.startswith(prefix)]
        for method in grids(results(found, arm)[0]):
            cells = [spread(values(found, arm, f"accuracy.{method}.{kind}"), 1) for kind in kinds]
            rows.append((f"`{arm}`", TITLES[method], *cells))
    return _table(("arm", "decoding", *kinds), rows)


def _experts(found: Reproduction) -> str:
    rows = []
    for arm in found.arms:
        trained = _routed(results(found, arm)[0]).picks
        for number in (int(value) for value in results(found, arm)[0].series["numbers"]):
            cells = spread(values(found, arm, f"experts.{number}"), 1)
            shown = f"**{number}**, trained" if number == trained else str(number)
            paper = f"{PAPER_EXPERTS[number - 1]:.1f}" if arm == "moe" and number <= len(PAPER_EXPERTS) else ""
            rows.append((f"`{arm}`", shown, cells, paper))
    return _table(("arm", "experts", "accuracy, %", "paper: Mixtral on GSM8K, trained with 2"), rows)


def _strengths(found: Reproduction) -> str:
    rows = []
    for arm in found.arms:
        first = results(found, arm)[0]
        for title, method in (("self-contrast", CONTRAST), ("stronger strong pass", STRONGER)):
            for place, setting in enumerate(grids(first).get(method, ())):
                accuracies = [result.series[f"dev.{method}"][place] for result in results(found, arm)]
                rows.append((f"`{arm}`", title, setting.label, spread(accuracies, 1)))
    return _table(("arm", "", "weak routing and beta", "accuracy on the development split, %"), rows)


def _passes(found: Reproduction) -> str:
    rows = []
    for arm in found.arms:
        names = [name.removeprefix("kl.") for name in results(found, arm)[0].measurements if name.startswith("kl.")]
        for name in names:
            rank = int(name.removeprefix("rank=")) if name.startswith("rank=") else 0
            paper = (
                (f"{PAPER_KL[rank - 1]:.2f}", f"{PAPER_UNCHOSEN[rank - 1]:.1f}") if rank and arm == "moe" else ("", "")
            )
            if arm == "moe" and not rank:
                paper = ({"random=1": "10.36", "amateur": "0.25"}.get(name, ""), "")
            kl = [spread(values(found, arm, f"{kind}.{name}"), 2) for kind in ("kl", "kl_expression", "kl_other")]
            rows.append(
                (f"`{arm}`", f"`{name}`", *kl, paper[0], spread(values(found, arm, f"unchosen.{name}"), 1), paper[1])
            )
    head = (
        "arm",
        "weak pass",
        "KL, nats",
        "at expressions",
        "elsewhere",
        "paper, 1e-5",
        "unchosen experts, %",
        "paper",
    )
    return _table(head, rows)


def _votes(found: Reproduction) -> str:
    rows = []
    for arm in found.arms:
        options = _options(results(found, arm)[0])
        for way, title in (
            (PLAIN, f"plain, temperature {options.temperature:g}"),
            (CONTRASTED, "self-contrast as chosen, no temperature"),
        ):
            cells = [spread(values(found, arm, f"majority.{way}.{votes}"), 1) for votes in options.votes]
            rows.append((f"`{arm}`", title, *cells))
    votes = _options(results(found, found.arms[0])[0]).votes
    return _table(("arm", "samples", *(f"majority of {number}" for number in votes)), rows) if votes else ""


def _times(found: Reproduction) -> str:
    rows = []
    for arm in found.arms:
        first = results(found, arm)[0]
        options, routed = _options(first), _routed(first)
        chosen = timed(routed, options, "amateur" if "amateur" in first.measurements else None)
        for method, setting in chosen.items():
            cells = []
            for place, _ in enumerate(options.latency_batches):
                suffix = f".b{options.latency_batches[place]}" if place else ""
                cells += [
                    spread(values(found, arm, f"{kind}.{method}{suffix}"), digits)
                    for kind, digits in (("latency", 2), ("tokens_per_second", 0))
                ]
            plan = {CONTRAST: ", two rows", TWO_PASSES: ", two passes"}.get(method, "")
            title = TITLES["self-contrast" if method == TWO_PASSES else method]
            rows.append((f"`{arm}`", title + plan, setting.label, *cells))
    batches = _options(results(found, found.arms[0])[0]).latency_batches
    heads = [head for rows_of in batches for head in (f"time / greedy, batch {rows_of}", f"tokens/s, batch {rows_of}")]
    return _table(("arm", "decoding", "setting", *heads), rows)


def _exact(found: Reproduction) -> str:
    titles = {
        "same.beta_0": "beta 0 against greedy",
        "same.weak_is_strong": "weak pass with the trained routing against greedy",
        "same.alpha_1": "alpha 1 against greedy",
        "same.plans": "two rows against two passes",
        "same.contrast": "for comparison: the fixed setting against greedy",
    }
    rows = [
        (f"`{arm}`", title, spread(values(found, arm, name), 1)) for arm in found.arms for name, title in titles.items()
    ]
    return _table(("arm", "texts", "equal, %"), rows)


def _axes(figure: Any, columns: int) -> list[Any]:
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for axis in axes:
        axis.grid(alpha=0.3)
    return list(axes)


def _draw_experts(figure: Any, found: Reproduction) -> None:
    for axis, arm in zip(_axes(figure, len(found.arms)), found.arms, strict=True):
        curves = [result.series["numbers.accuracy"] for result in results(found, arm)]
        numbers = results(found, arm)[0].series["numbers"]
        mean = [statistics.fmean(point) for point in zip(*curves, strict=True)]
        axis.plot(numbers, mean, marker=".", color="black", label="mean")
        for seed, curve in zip(found.seeds, curves, strict=True):
            axis.plot(numbers, curve, alpha=0.6, linewidth=0.8, label=f"seed {seed}")
        axis.axvline(_routed(results(found, arm)[0]).picks, color="gray", linestyle=":", label="trained")
        axis.set(xlabel="experts of each token", ylabel="accuracy, test split (%)", title=arm)
        axis.legend(frameon=False, fontsize=8)


def _draw_strengths(figure: Any, found: Reproduction) -> None:
    for axis, arm in zip(_axes(figure, len(found.arms)), found.arms, strict=True):
        first = results(found, arm)[0]
        options, weak = _options(first), _routed(first).weak(_options(first))
        accuracies = [result.series[f"dev.{CONTRAST}"] for result in results(found, arm)]
        means = [statistics.fmean(point) for point in zip(*accuracies, strict=True)]
        for place, name in enumerate(weak):
            own = means[place * len(options.betas) : (place + 1) * len(options.betas)]
            axis.plot(options.betas, own, marker=".", linewidth=1.1, label=name)
        trained = results(found, arm)[0].series["numbers"].index(_routed(first).picks)
        greedy = [result.series[f"dev.{ENSEMBLE}"][trained] for result in results(found, arm)]
        axis.axhline(statistics.fmean(greedy), color="gray", linestyle=":", label="greedy")
        axis.set(xlabel="beta", ylabel="accuracy, development split (%)", title=f"{arm}: weak passes")
        axis.set_xticks(options.betas)
        low, high = axis.get_ylim()
        axis.set_ylim(low, high + 0.35 * (high - low))  # room for the names
        axis.legend(frameon=False, fontsize=7, ncols=3, loc="upper right")


def _draw_passes(figure: Any, found: Reproduction) -> None:
    for axis, (name, label) in zip(
        _axes(figure, 2), (("kl", "KL(trained || rank) in nats"), ("unchosen", "unchosen experts (%)")), strict=True
    ):
        for color, arm in zip(("tab:blue", "tab:orange"), found.arms, strict=False):
            curves = [result.series[name] for result in results(found, arm)]
            places = range(1, len(curves[0]) + 1)
            axis.plot(
                places,
                [statistics.fmean(point) for point in zip(*curves, strict=True)],
                marker=".",
                color=color,
                label=arm,
            )
            for curve in curves:
                axis.plot(places, curve, color=color, alpha=0.3, linewidth=0.8)
        if name == "unchosen":
            axis.plot(range(1, 9), PAPER_UNCHOSEN, color="gray", linestyle=":", label="paper: Mixtral")
        axis.set(xlabel="rank of the weak pass's expert", ylabel=label, ylim=(0, None))
        axis.legend(frameon=False, fontsize=8)


def panel(axes: Any, seeds: list[Measured]) -> None:
    """What every decoding of the control arm gains over time that it takes; small points are seeds."""
    for method, title in TITLES.items():
        timed_as = CONTRAST if method == DEFAULT else method
        points = [
            (
                seed["moe"][f"latency.{timed_as}"],
                seed["moe"][f"accuracy.{method}"] - seed["moe"][f"accuracy.{GREEDY}"],
            )
            for seed in seeds
            if f"latency.{timed_as}" in seed["moe"] and f"accuracy.{method}" in seed["moe"]
        ]
        if points:
            x, y = (statistics.fmean(values) for values in zip(*points, strict=True))
            [line] = axes.plot(x, y, marker="o", linestyle="", markersize=6, label=title)
            axes.plot(*zip(*points, strict=True), marker=".", linestyle="", color=line.get_color(), alpha=0.4)
    axes.axhline(0, color="gray", linestyle=":")
    axes.set(xlabel="time / greedy", ylabel="accuracy - greedy's, test split (points)", title="Accuracy over cost")
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.6 * (high - low))  # room for the names
    axes.legend(frameon=False, fontsize=6, loc="upper left")


SECTIONS = (
    Section(
        "All decodings",
        "On the test split, each method with the setting that was best on the development split. Means over seeds; *gained* "
        "and *lost* count problems of all seeds that only this decoding or only greedy decoding answers right, and p is of "
        "McNemar's exact test over them.",
        _decodings,
    ),
    Section("By kind of problem", "The same answers, accuracy in percent.", _kinds),
    Section(
        "The number of experts",
        "Greedy decoding with other numbers of experts than the model was trained with (figure 1 and table 7 of the paper), "
        "on the test split; nothing is chosen here.",
        _experts,
        _draw_experts,
        caption="Accuracy over the number of experts, by seed",
    ),
    Section(
        "Weak routing and strength",
        "Accuracy of every setting on the development split, from which one is taken.",
        _strengths,
        _draw_strengths,
        size=(9.6, 4.2),
        caption="Accuracy over beta by routing of the weak pass",
    ),
    Section(
        "How far the passes are apart",
        "KL divergence from the trained routing's distribution to that of a weak pass, and the share of the weak pass's experts "
        "that the trained routing does not pick for the same token, along greedy answers to test problems.",
        _passes,
        _draw_passes,
        caption="KL divergence and unchosen experts by rank",
    ),
    Section(
        "Votes",
        "Accuracy in percent of the majority over samples (self-consistency); the first sample decides ties.",
        _votes,
    ),
    Section(
        "Time",
        "Batch 1 unless it says otherwise, a fixed number of tokens, median of interleaved repeats. The paper's table 3 has, "
        "for Mixtral on four A100: dynamic routing 1.09, three experts 1.19, contrastive search 1.62, DoLa 1.06, contrastive "
        "decoding 1.43, SCMoE 1.30.",
        _times,
    ),
    Section(
        "Exactness", "Texts of the development split that are equal, with the fixed setting where not said.", _exact
    ),
    Section(
        "With a model of yours",
        "Size `gpu` trains nothing and measures a checkpoint: Mixtral, Qwen-MoE, DeepSeek-MoE, or any MoE model whose routing can "
        "be overridden. It needs the folder of the model; settings are tried that fit it: single ranks as weak passes, or one to "
        "three experts where the model picks four or more. Tasks are JSONL files of generated answers "
        "([format](../tasks.md)); without any, our problems are asked behind worked ones. `measure.amateur` names a smaller "
        "model with the same tokenizer, and `checkpoint.split=true` spreads a large one over all GPUs."
        "\n\n<!-- no-run: needs a checkpoint and a GPU -->\n```bash\n"
        "moesaic reproduce scmoe --size gpu --seeds 0 --set checkpoint.path=/models/Mixtral-8x7B-v0.1 \\\n"
        "  --set 'measure.tasks=[gsm8k.jsonl]'\n```",
    ),
)
