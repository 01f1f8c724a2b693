"""Tables and figures of the OpenMoE reproduction, from the measurements of `openmoe_measure`."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from moesaic.papers.experiment import Section
from moesaic.papers.openmoe_measure import QUARTERS
from moesaic.papers.page import spread
from moesaic.papers.reproduce import Reproduction

COLORS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple")


def layers_of(found: Reproduction) -> list[str]:
    """Names of the MoE layers: L1, L3."""
    names = next(iter(found.results.values()))[found.experiment.control].measurements
    return sorted(
        (name.rpartition(".")[2] for name in names if name.startswith("token_s.")), key=lambda name: int(name[1:])
    )


def domains_of(found: Reproduction) -> list[str]:
    """Names of the domains."""
    names = next(iter(found.results.values()))[found.experiment.control].measurements
    return [name.removeprefix("loss.") for name in names if name.startswith("loss.")]


def values(found: Reproduction, name: str, arm: str | None = None) -> list[float]:
    """A measurement of an arm, the control if none is named, by seed; empty where it was not measured."""
    results = [found.results[seed][arm or found.experiment.control].measurements for seed in found.seeds]
    return [result[name] for result in results if name in result]


def series(found: Reproduction, name: str) -> list[list[float]]:
    """A list of the control arm by seed."""
    results = [found.results[seed][found.experiment.control].series for seed in found.seeds]
    return [result[name] for result in results if name in result]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in (head, *rows)]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])


def _bars(found: Reproduction) -> str:
    """How many seeds have each advantage above zero."""
    rows = []
    for judgement in found.judgements():
        met = sum(value > 0 for value in judgement.values)
        each = ", ".join(f"{value:+.3g}" for value in judgement.values)
        rows.append((judgement.claim.name, each, f"{met} of {len(judgement.values)}"))
    return _table(("claim", f"advantage with seeds {', '.join(map(str, found.seeds))}", "met by"), rows)


def _specialisation(found: Reproduction) -> str:
    rows = []
    for layer in layers_of(found):
        for prefix, when in (("start_", "before training"), ("", "trained")):
            for group in ("token", "position"):

                def cell(
                    name: str, digits: int = 4, prefix: str = prefix, group: str = group, layer: str = layer
                ) -> str:
                    return spread(values(found, f"{prefix}{group}_{name}.{layer}"), digits)

                deviations = [cell(name) for name in ("s", "floor", "excess", "s_rel")]
                rows.append((layer, when, group, *deviations, cell("nmi", 3), cell("nmi_permuted", 3)))
    head = ("layer", "router", "grouped by", "s", "floor", "excess", "s_rel", "NMI", "NMI, labels shuffled")
    return _table(head, rows)


def _saturation(found: Reproduction) -> str:
    steps = series(found, "steps")
    rows = []
    for place, step in enumerate(steps[0] if steps else []):
        curves = [
            series(found, f"{name}.{layer}")
            for layer in layers_of(found)
            for name in ("saturation", "saturation_corrected", "saturation_first_corrected", "cosine")
        ]
        rows.append((f"{step:.0f}", *(spread([curve[place] for curve in seeds], 2) for seeds in curves)))
    names = ("K", "K, corrected", "first, corrected", "cosine")
    return _table(("step", *(f"{layer}: {name}" for layer in layers_of(found) for name in names)), rows)


def _drops(found: Reproduction) -> str:
    kinds = (
        ("", "2.0, first choices first"),
        ("tight_", "1.0, first choices first"),
        ("tight_token_first_", "1.0, token by token"),
    )
    groups = [*(f"drop.{name}" for name in domains_of(found)), "drop_permuted", "drop_uniform"]
    titles = {"drop_permuted": "*in-domain, tokens in random order*", "drop_uniform": "*random picks*"}
    rows = []
    for prefix, kind in kinds:
        for group in groups:
            quarters = [spread(values(found, f"{prefix}{group}.q{quarter}"), 1) for quarter in range(1, QUARTERS + 1)]
            mean = spread(values(found, f"{prefix}{group}"), 1)
            text = group.removeprefix("drop.")
            repeated = spread(values(found, f"repeated.{text}")[:1], 0)
            rows.append((kind, titles.get(group, text), *quarters, mean, repeated))
    return _table(("capacity factor", "text", "1st quarter", "2nd", "3rd", "4th", "all", "four commonest ids"), rows)


def _remedies(found: Reproduction) -> str:
    rows = []
    for arm in found.arms:
        cells = [
            spread(values(found, f"drop.{domain}.{layer}", arm), 1)
            for domain in domains_of(found)
            for layer in layers_of(found)
        ]
        rows.append((f"`{arm}`", *cells, spread(values(found, "token_nmi", arm), 3)))
    head = [f"{domain}, {layer}" for domain in domains_of(found) for layer in layers_of(found)]
    return _table(("arm", *head, "NMI of token ids"), rows)


def _published(found: Reproduction) -> str:
    rows = []
    rows.append(("co-activation: largest of a row, mean", "coactivation", "coactivation_even", 3))
    rows += [
        (f"domain: largest share of {name}", f"domain_most_{name}", "domain_even", 3) for name in domains_of(found)
    ]
    for ids, title in (("token", "token itself"), ("predicted", "predicted token"), ("next", "next token")):
        for kind, ranks in (("first", "first choice"), ("any", "any choice")):
            name = f"vocabulary_{ids}_{kind}"
            rows.append((f"vocabulary: {title}, {ranks}", name, f"{name}_random", 3))
    lines = []
    for title, name, reference, digits in rows:
        cells = [
            spread(values(found, f"{each}.{layer}"), digits) for layer in layers_of(found) for each in (name, reference)
        ]
        lines.append((title, *cells))
    return _table(("metric", *(f"{layer}{by}" for layer in layers_of(found) for by in ("", ", by chance"))), lines)


def _axes(figure: Any, columns: int) -> list[Any]:
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for axis in axes:
        axis.grid(alpha=0.3)
    return list(axes)


def _mean(curves: list[list[float]]) -> list[float]:
    """Mean over seeds, as far as the shortest goes."""
    return [statistics.fmean(points) for points in zip(*curves, strict=False)]


def _draw_specialisation(figure: Any, found: Reproduction) -> None:
    axes = _axes(figure, 2)
    for axis, group, label in zip(axes, ("token", "position"), ("token ids, by s", "position"), strict=True):
        for color, layer in zip(COLORS, layers_of(found), strict=False):
            for name, style in (("curve", "-"), ("floor_curve", ":")):
                curve = _mean(series(found, f"{group}_{name}.{layer}"))
                curve = sorted(curve) if group == "token" else curve
                axis.plot(curve, style, color=color, linewidth=1.2, label=f"{layer}{', floor' if style == ':' else ''}")
        axis.set(xlabel=label, ylabel="standard deviation s", ylim=(0, None))
        axis.legend(frameon=False, fontsize=8)
    axes[1].set_ylim(axes[0].get_ylim())


def _draw_saturation(figure: Any, found: Reproduction) -> None:
    axes = _axes(figure, 2)
    [steps, *_] = series(found, "steps") or [[]]
    shown = [max(step, 1) for step in steps]
    for axis, name, title in zip(
        axes, ("saturation", "saturation_first"), ("all K choices", "first choice"), strict=True
    ):
        for color, layer in zip(COLORS, layers_of(found), strict=False):
            curves = series(found, f"{name}.{layer}")
            axis.plot(shown, _mean(curves), marker=".", color=color, label=layer)
            for curve in curves:
                axis.plot(shown, curve, color=color, alpha=0.3, linewidth=0.8)
        chance = _chance(found) / (1 if name == "saturation" else _top_k(found))
        axis.axhline(chance, color="gray", linestyle=":", label="chance")
        axis.set(xscale="log", xlabel="step (0 at 1)", ylabel="as in the last model", title=title, ylim=(0, 1.02))
        axis.legend(frameon=False, fontsize=8)


def _chance(found: Reproduction) -> float:
    """K / E."""
    return values(found, "domain_even")[0]


def _top_k(found: Reproduction) -> int:
    return found.results[found.seeds[0]][found.experiment.control].run["moe"]["router"]["top_k"]


def _draw_drops(figure: Any, found: Reproduction) -> None:
    layers = layers_of(found)
    for axis, layer in zip(_axes(figure, len(layers)), layers, strict=True):
        for color, domain in zip(COLORS, domains_of(found), strict=False):
            curves = series(found, f"drop.{domain}.places.{layer}")
            if curves:
                width = found.results[found.seeds[0]][found.experiment.control].run["data"]["sequence_length"]
                places = [(place + 0.5) * width / len(curves[0]) for place in range(len(curves[0]))]
                axis.plot(places, _mean(curves), color=color, label=domain)
        axis.set(
            xlabel="place in the sequence",
            ylabel="dropped picks (%)",
            title=f"{layer}, capacity factor 2",
            ylim=(0, None),
        )
        axis.legend(frameon=False, fontsize=8)


def _draw_published(figure: Any, found: Reproduction) -> None:
    layers = layers_of(found)
    axes = figure.subplots(2, len(layers), squeeze=False)
    for column, layer in enumerate(layers):
        [matrix, *_] = series(found, f"coactivation_matrix.{layer}")
        size = round(len(matrix) ** 0.5)
        cells = [matrix[row * size : (row + 1) * size] for row in range(size)]
        image = axes[0][column].imshow(cells, vmin=0, vmax=0.6, cmap="Blues")
        for axis in axes[:, column]:
            axis.xaxis.get_major_locator().set_params(integer=True)
        axes[0][column].set(title=f"{layer}: co-activation", xlabel="expert", ylabel="of the tokens of expert")
        figure.colorbar(image, ax=axes[0][column])
        names = domains_of(found)
        for place, (color, domain) in enumerate(zip(COLORS, names, strict=False)):
            [shares, *_] = series(found, f"domain_{domain}.{layer}")
            x = [expert + (place - (len(names) - 1) / 2) * 0.8 / len(names) for expert in range(len(shares))]
            axes[1][column].bar(x, shares, width=0.8 / len(names), color=color, label=domain)
        axes[1][column].axhline(_chance(found), color="gray", linestyle=":")
        axes[1][column].set(xlabel="expert", ylabel="share of the domain's tokens", title=f"{layer}: domains")
        axes[1][column].legend(frameon=False, fontsize=7)


def section(title: str, text: str, table: Callable[[Reproduction], str], draw: Any = None, **options: Any) -> Section:
    """A part of the page."""
    return Section(title, text, table, draw, **options)


SECTIONS = (
    section(
        "Seed by seed",
        "The advantage of each claim with each seed. Where claims state a bar, one seed of three may miss it.",
        _bars,
    ),
    section(
        "What routers look at",
        "For each group of tokens (those of one id, or at one position of the sequence), f is the share of each expert among "
        "its selections, and s the standard deviation of f over experts: 0 is uniform. *Floor* is the s of random routing with "
        "as many tokens, *excess* what is left above it. An untrained router favours some experts for all tokens, so s is "
        "high for every grouping: *s_rel* is the distance to the average f instead. *NMI* is the share of the routing's "
        "entropy that the group explains, beside its mean over permutations of the labels. Ids need 32 uses for s. "
        "In-domain held-out text; OpenMoE reports 0.085 for ids (floor 0.011) and 0.009 for positions (floor 0.006) with 32 "
        "experts.",
        _specialisation,
        _draw_specialisation,
        caption="Deviation s of token ids and of positions, with the floor of random routing",
    ),
    section(
        "When routers decide",
        "Share of the selections that a checkpoint makes as the last model does, on the same text, for all K choices and for "
        "the first; *corrected* puts chance at 0 and full agreement at 1. The cosine is between the distributions of token "
        "ids over experts.",
        _saturation,
        _draw_saturation,
        caption="Router saturation over training steps",
    ),
    section(
        "Whom a capacity drops",
        "Dropped picks in percent, by quarter of the sequence; means over layers. Nothing was dropped in training: capacities "
        "are applied afterwards to what routers selected, to each sequence by itself. Two controls: the same picks with the "
        "tokens of each sequence in random order, where late tokens can only lose by coming late; and random picks, the floor "
        "of balanced routing. *Four commonest ids* is the share of a sequence's tokens that have one of its four most frequent "
        "ids, in percent: routers that go by token id send them to the same experts.",
        _drops,
        _draw_drops,
        caption="Dropped picks by place in the sequence and kind of text",
    ),
    section(
        "Remedies",
        "Dropped picks in percent at capacity factor 2, all places, by kind of text and layer. Losses by kind of text are in "
        "the table of arms.",
        _remedies,
    ),
    section(
        "OLMoE's metrics",
        "On the control arm: [co-activation, domain and vocabulary specialisation](https://arxiv.org/abs/2409.02060) with the "
        "value of even, independent or random routing beside each. Vocabulary: the largest share of an id's occurrences that "
        "one expert gets, mean over ids, for the token itself, the one the model predicts and the one that comes.",
        _published,
        _draw_published,
        size=(9.6, 7.2),
        caption="Co-activation, and the experts of each domain",
    ),
)
