"""`write_report`: what the router did, as one HTML page that opens anywhere without a network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from moesaic.errors import ConfigError
from moesaic.files import write_text
from moesaic.layer import max_violation, routing_entropy
from moesaic.trace import plots
from moesaic.trace.accounting import Accounting, short
from moesaic.trace.metrics import TokenShare, coactivation, load_shares, relative_load, top_tokens
from moesaic.trace.record import LayerTrace, RoutingTrace
from moesaic.trace.router_statistics import RouterStatistics

# Matrix cells of all detailed layers together; more would make the page slow to open.
MAX_CELLS = 400_000
PAIRS_SHOWN = 12


@dataclass(frozen=True)
class LayerSummary:
    """One row of the tables over all layers."""

    layer: int
    load: list[int]
    relative: list[float]
    entropy: float
    max_violation: float

    @property
    def unused(self) -> int:
        """Experts without a pick."""
        return self.load.count(0)


@dataclass(frozen=True)
class ExpertTokens:
    """One row of the token table of a layer."""

    expert: int
    load: int
    share: float
    specific: list[TokenShare]
    frequent: list[TokenShare]


@dataclass(frozen=True)
class LayerDetail:
    """Everything shown for a chosen layer."""

    summary: LayerSummary
    load_plot: Markup
    tokens: list[ExpertTokens]
    pairs: list[tuple[int, int, float]]
    coactivation: list[list[float]]
    coactivation_plot: Markup
    independent: float
    domains: dict[str, list[float]]
    domain_plot: Markup | None


def write_report(
    path: str | Path,
    trace: RoutingTrace,
    accounting: Accounting,
    *,
    title: str,
    tokenizer: Any = None,
    facts: Mapping[str, str] | None = None,
    statistics: Sequence[RouterStatistics] = (),
    top: int = 8,
    minimum: int = 5,
) -> Path:
    """Write the routing report: one self-contained HTML file, in place of what was there only when complete.

    Args:
        path: file to write.
        trace: recorded with `keep="tokens"`.
        accounting: of the model that was traced.
        title: name of the model.
        tokenizer: tokenizer of transformers that makes token ids readable; without one, ids are shown.
        facts: further lines for the head of the page (text, checkpoint, command).
        statistics: of the routers, from `router_statistics`; empty leaves that section out.
        top: tokens listed for each expert.
        minimum: a token counts as specific to an expert from this many picks on.

    Returns:
        The path.

    Raises:
        ConfigError: if the trace holds no tokens, or only counts.
        OSError: if the file can't be written.
    """
    write_text(path, render_report(trace, accounting, title, tokenizer, dict(facts or {}), statistics, top, minimum))
    return Path(path)


def render_report(
    trace: RoutingTrace,
    accounting: Accounting,
    title: str,
    tokenizer: Any,
    facts: dict[str, str],
    statistics: Sequence[RouterStatistics],
    top: int,
    minimum: int,
) -> str:
    """The page of `write_report` as text."""
    if not trace.num_tokens:
        raise ConfigError("trace", 0, "holds no tokens", "run the model inside the record block")
    layers = [trace.layers[index] for index in sorted(trace.layers)]
    summaries = [_summary(layer) for layer in layers]
    detailed = _spread(layers, MAX_CELLS // max(layer.num_experts for layer in layers) ** 2)
    by_layer = {summary.layer: summary for summary in summaries}
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("moesaic.trace", "template"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"short": short, "percent": "{:.2%}".format, "token": _token_names(tokenizer)}
    return environment.get_template("report.html.j2").render(
        title=title,
        facts=facts,
        trace=trace,
        accounting=accounting,
        summaries=summaries,
        worst=max(summaries, key=lambda summary: summary.max_violation),
        num_experts=max(layer.num_experts for layer in layers),
        load_plot=_load_plot(summaries),
        entropy_plot=_over_layers(summaries, "entropy", "Routing entropy", maximum=1.0),
        violation_plot=_over_layers(summaries, "max_violation", "MaxVio"),
        details=[_detail(layer, by_layer[layer.layer], trace, top, minimum) for layer in detailed],
        minimum=minimum,
        pairs_shown=PAIRS_SHOWN,
        statistics=statistics,
        frequency_plot=_frequency_plot(statistics),
        position_plot=_position_plot(statistics),
    )


def _summary(layer: LayerTrace) -> LayerSummary:
    load_N = layer.load_N
    return LayerSummary(
        layer=layer.layer,
        load=load_N.tolist(),
        relative=relative_load(load_N).tolist(),
        entropy=float(routing_entropy(load_N)),
        max_violation=float(max_violation(load_N)),
    )


def _detail(layer: LayerTrace, summary: LayerSummary, trace: RoutingTrace, top: int, minimum: int) -> LayerDetail:
    matrix_NN = coactivation(layer.index_TK, layer.num_experts).numpy()
    names = [str(expert) for expert in range(layer.num_experts)]
    domains = {name: relative_load(load_N).tolist() for name, load_N in layer.domain_loads.items() if name}
    strongest = np.argsort(-matrix_NN, axis=None, kind="stable")[:PAIRS_SHOWN]
    pairs = [(int(i), int(j)) for i, j in zip(*np.unravel_index(strongest, matrix_NN.shape), strict=True)]
    return LayerDetail(
        summary=summary,
        load_plot=plots.bars(
            np.array(summary.relative),
            label=f"Load of each expert of layer {layer.layer} relative to the mean",
            column_title="expert",
            value_title="load / mean load",
            names=names,
            reference=(1.0, "balanced"),
        ),
        tokens=_expert_tokens(layer, trace, top, minimum),
        pairs=[(i, j, float(matrix_NN[i, j])) for i, j in pairs if matrix_NN[i, j] > 0],
        coactivation=matrix_NN.tolist(),
        coactivation_plot=plots.heatmap(
            matrix_NN,
            label=f"Co-activation of the experts of layer {layer.layer}",
            row_title="of the tokens of expert",
            column_title="this share also picked expert",
            row_names=names,
            column_names=names,
            width=620.0,
        ),
        independent=_independent(layer),
        domains=domains,
        domain_plot=_domain_plot(layer.layer, domains, names) if len(domains) > 1 else None,
    )


def _independent(layer: LayerTrace) -> float:
    """Co-activation of picks made independently and evenly: (K - 1) / (N - 1), K being the picks beside a pick."""
    picks_T = (layer.index_TK < layer.num_experts).sum(-1).double()
    beside = float((picks_T * (picks_T - 1)).sum() / picks_T.sum().clamp(min=1))
    return beside / max(layer.num_experts - 1, 1)


def _expert_tokens(layer: LayerTrace, trace: RoutingTrace, top: int, minimum: int) -> list[ExpertTokens]:
    load, shares = layer.load_N.tolist(), load_shares(layer.load_N).tolist()
    token_ids_T = trace.token_ids_T
    if token_ids_T is None:
        return []
    picks = layer.index_TK, token_ids_T, layer.num_experts
    specific = top_tokens(*picks, by="lift", top=top, minimum=minimum)
    frequent = top_tokens(*picks, by="count", top=top)
    return [
        ExpertTokens(expert, load[expert], shares[expert], specific[expert], frequent[expert])
        for expert in range(layer.num_experts)
    ]


def _spread(layers: list[LayerTrace], limit: int) -> list[LayerTrace]:
    """At most `limit` layers, at least one, evenly spread and with the first and the last."""
    chosen = np.unique(np.linspace(0, len(layers) - 1, min(max(limit, 1), len(layers))).round().astype(int))
    return [layers[index] for index in chosen]


def _load_plot(summaries: list[LayerSummary]) -> Markup:
    experts = max(len(summary.load) for summary in summaries)
    values = np.full((len(summaries), experts), np.nan)
    for row, summary in enumerate(summaries):
        values[row, : len(summary.relative)] = summary.relative
    return plots.heatmap(
        values,
        label="Load of every expert in every layer relative to the layer's mean",
        row_title="layer",
        column_title="expert",
        row_names=[str(summary.layer) for summary in summaries],
        column_names=[str(expert) for expert in range(experts)],
        reference=(1.0, "1 = balanced"),
        mark_zeros=True,
    )


def _domain_plot(layer: int, domains: dict[str, list[float]], names: list[str]) -> Markup:
    return plots.heatmap(
        np.array(list(domains.values())),
        label=f"Load of each expert of layer {layer} by domain, relative to the domain's mean",
        row_title="domain",
        column_title="expert",
        row_names=list(domains),
        column_names=names,
        reference=(1.0, "1 = balanced"),
        mark_zeros=True,
    )


def _frequency_plot(statistics: Sequence[RouterStatistics]) -> Markup | None:
    """Experts per token by frequency, where tokens differ in the number of their experts."""
    rows = [row for row in statistics if row.experts_std and row.by_frequency]
    if not rows:
        return None
    return plots.heatmap(
        np.array([[bucket.experts for bucket in row.by_frequency] for row in rows]),
        label="Experts that a token ran, by how often it occurs in the text",
        row_title="layer",
        column_title="occurrences of the token, from",
        row_names=[str(row.layer) for row in rows],
        column_names=[str(bucket.least) for bucket in rows[0].by_frequency],
    )


def _position_plot(statistics: Sequence[RouterStatistics]) -> Markup | None:
    """Drop rate by position, where a capacity dropped anything."""
    rows = [row for row in statistics if any(row.drops_by_position)]
    if not rows:
        return None
    return plots.heatmap(
        np.array([row.drops_by_position for row in rows]),
        label="Share of the picks that were dropped, by position in the sequence",
        row_title="layer",
        column_title="quarter of the positions",
        row_names=[str(row.layer) for row in rows],
        column_names=[str(quarter + 1) for quarter in range(len(rows[0].drops_by_position))],
    )


def _over_layers(summaries: list[LayerSummary], field: str, name: str, maximum: float | None = None) -> Markup:
    return plots.bars(
        np.array([getattr(summary, field) for summary in summaries]),
        label=f"{name} of every layer",
        column_title="layer",
        value_title=name,
        names=[str(summary.layer) for summary in summaries],
        maximum=maximum,
        width=480.0,
        height=150.0,
    )


def _token_names(tokenizer: Any):
    """A function from token id to text in which blanks and line ends are visible."""

    def name(token_id: int) -> str:
        if tokenizer is None:
            return str(token_id)
        text = tokenizer.decode([token_id], skip_special_tokens=False)
        if not text or "\ufffd" in text:
            # Part of a character; the vocabulary's own spelling at least tells such tokens apart.
            return str(tokenizer.convert_ids_to_tokens(token_id))
        return text.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥").replace("\r", "␍")

    return name
