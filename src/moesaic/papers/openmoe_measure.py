"""What is measured of the arms of the OpenMoE reproduction: specialisation, saturation, drops, and OLMoE's metrics.

Names of measurements end in the layer (`token_s.L1`); without one they are means over layers.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from moesaic.layer import CapacityConfig, max_violation
from moesaic.papers.experiment import Measurement, Trained
from moesaic.trace import LayerCounts, RoutingCounts, RoutingLog, Rows, TraceHeader, count, record
from moesaic.trace.metrics import (
    apply_capacity,
    coactivation_table,
    distribution_change,
    domain_specialisation,
    drop_rates,
    group_information,
    router_saturation,
    routing_deviation,
    vocabulary_specialisation,
)
from moesaic.train import RunConfig, load_model

WINDOWS = 96
"""Held-out sequences of each domain that routing is looked at on, evenly spread over its text."""

MIN_USES = 32
"""Occurrences that a token id must have for its routing deviation."""

CAPACITIES = {"": (2.0, "rank_first"), "tight_": (1.0, "rank_first"), "tight_token_first_": (1.0, "token_first")}
"""Capacity factor and order of choices that are applied to the logs, by the prefix of what they give."""

QUARTERS = 4
PLACES = 32
"""Stretches of the sequence that the figure of drops shows."""

_TOGETHER = 16
_TABLES = ("token", "position", "domain", "next", "predicted", "block", "drops", "pairs")


def measure(trained: Trained) -> dict[str, Measurement]:
    """All of it for the trained model; what needs earlier checkpoints only for arms that kept some."""
    windows = held_out_windows(trained)
    inside = {domain: windows[domain] for domain in in_domain(trained.run) if domain in windows}
    outside = {domain: rows for domain, rows in windows.items() if domain not in inside}
    log, predicted_T = trace_windows(trained.model, inside)
    other, _ = trace_windows(trained.model, outside)
    counts = count(log, tables=_TABLES, predicted_T=predicted_T)
    found = _Found()
    _specialisation(found, "", counts)
    _published(found, counts, counts_of_all(counts, other))
    _drops(found, trained.run, log, other)
    found.values |= {f"repeated.{domain}": repeated(ids_BT) for domain, ids_BT in windows.items()}
    if len(trained.checkpoints) > 1:
        _development(found, trained, inside, log, counts)
    found.average()
    return found.values


def in_domain(run: RunConfig) -> list[str]:
    """Domains that all arms train on: all that the mixture names but the one that remedies mix in."""
    assert run.data.mixture is not None
    named = dict.fromkeys(domain for stretch in run.data.mixture for domain in stretch.shares)
    return [domain for domain in named if domain != "chat"]


def held_out_windows(trained: Trained) -> dict[str, Tensor]:
    """Token ids of `WINDOWS` whole held-out sequences of each domain, int64 (B, T)."""
    windows = {}
    for domain, sequences in trained.data.validation.items():
        whole = sequences.num_tokens // sequences.sequence_length
        if whole:
            chosen = np.unique(np.linspace(0, whole - 1, min(WINDOWS, whole)).round().astype(int))
            windows[domain] = sequences.batch(chosen)["input_ids"]
    return windows


def repeated(ids_BT: Tensor, ids: int = 4) -> float:
    """Share of a sequence's tokens, in percent, that are one of its so many most frequent ids; mean over sequences.

    What routes by token id sends these tokens to the same few experts.
    """
    shares = [row_T.bincount().sort(descending=True).values[:ids].sum() / len(row_T) for row_T in ids_BT]
    return round(100 * float(torch.stack(shares).mean()), 6)


@torch.no_grad()
def trace_windows(model: PreTrainedModel, windows: Mapping[str, Tensor]) -> tuple[RoutingLog, Tensor]:
    """The routing of all windows, each a document, and the ids predicted after their tokens, int64 (tokens,)."""
    predicted = [torch.empty(0, dtype=torch.int64)]
    with record(model) as trace:
        for domain, ids_BT in windows.items():
            with trace.domain(domain):
                for part_BT in ids_BT.split(_TOGETHER):
                    logits = model(input_ids=part_BT.to(model.device), use_cache=False).logits
                    predicted.append(logits.argmax(-1).flatten().cpu())
    return trace, torch.cat(predicted)


def counts_of_all(counts: RoutingCounts, other: RoutingLog) -> RoutingCounts:
    """Loads of all domains, for the comparison of domains."""
    if not other.header.layers:
        return counts
    tables = ("domain", "block")
    layers = {
        index: replace(layer, groups={name: layer.groups[name] for name in tables}, drops={}, pairs_MM=None)
        for index, layer in counts.layers.items()
    }
    return replace(counts, layers=layers, tables=frozenset(tables)) + count(other, tables=tables)


class _Found:
    """Measurements so far."""

    def __init__(self) -> None:
        self.values: dict[str, Measurement] = {}
        self._layers: dict[str, list[float]] = {}

    def add(self, name: str, layer: int, value: float) -> None:
        """A number of one layer; means over layers come with `average`."""
        self.values[f"{name}.L{layer}"] = round(float(value), 6)
        self._layers.setdefault(name, []).append(float(value))

    def add_list(self, name: str, layer: int, values: Tensor | Sequence[float]) -> None:
        """Numbers of one layer for a figure or a table."""
        values = values.flatten().tolist() if isinstance(values, Tensor) else values
        self.values[f"{name}.L{layer}"] = [round(float(value), 4) for value in values]

    def average(self) -> None:
        """Add means over layers."""
        self.values |= {name: round(statistics.fmean(values), 6) for name, values in self._layers.items()}


def _specialisation(found: _Found, prefix: str, counts: RoutingCounts) -> None:
    """How far token ids and positions route from uniform and from the average, and what they explain."""
    for index, layer in counts.layers.items():
        for group, least in (("token", MIN_USES), ("position", 1)):
            deviation = routing_deviation(layer, group, min_count=least)
            information = group_information(layer, group)
            for name, value in (
                ("s", deviation.value),
                ("floor", deviation.reference),
                ("s_rel", deviation.values["relative"]),
                ("excess", deviation.values["excess"]),
                ("groups", deviation.values["groups"]),
                ("nmi", information.value),
                ("nmi_permuted", information.reference),
            ):
                assert value is not None
                found.add(f"{prefix}{group}_{name}", index, value)
            if not prefix:
                order = deviation.table["value"].argsort() if group == "token" else slice(None)
                for name, column in (("curve", "value"), ("floor_curve", "floor")):
                    found.add_list(f"{group}_{name}", index, deviation.table[column][order])


def _published(found: _Found, counts: RoutingCounts, whole: RoutingCounts) -> None:
    """OLMoE's metrics (arXiv 2409.02060, section 5), and the balance over all text that is trained on."""
    for index, layer in counts.layers.items():
        found.add("max_violation", index, float(max_violation(layer.load_N)))
        together = coactivation_table(layer)
        found.add("coactivation", index, together.value)
        found.add("coactivation_even", index, together.reference or 0.0)
        found.add("coactivation_row_error", index, together.values["row_sum_error"])
        assert together.matrix_GM is not None
        found.add_list("coactivation_matrix", index, together.matrix_GM.nan_to_num(0.0))
        for ids in ("token", "next", "predicted"):
            for name, first in (("first", True), ("any", False)):
                vocabulary = vocabulary_specialisation(layer, ids=ids, first=first)
                found.add(f"vocabulary_{ids}_{name}", index, vocabulary.value)
                found.add(f"vocabulary_{ids}_{name}_random", index, vocabulary.reference or 0.0)
        _domains(found, whole.layers[index], whole.header)


def _domains(found: _Found, layer: LayerCounts, header: TraceHeader) -> None:
    domains = domain_specialisation(layer, names=header.domains)
    found.add("domain_nmi", layer.layer, group_information(layer, "domain").value)
    found.add("domain_even", layer.layer, domains.reference or 0.0)
    assert domains.matrix_GM is not None
    for name, share_M in zip(domains.names, domains.matrix_GM, strict=True):
        found.add(f"domain_most_{name}", layer.layer, float(share_M.max()))
        found.add_list(f"domain_{name}", layer.layer, share_M)


def _drops(found: _Found, run: RunConfig, log: RoutingLog, other: RoutingLog) -> None:
    """What capacities would drop, in percent of the picks, by domain and quarter of the sequence.

    Controls: "permuted" has the tokens of each sequence in random order, so that only the order of filling is left to
    make late tokens worse off; "uniform" has random picks, the floor of balanced routing.
    """
    for prefix, (factor, order) in CAPACITIES.items():
        capacity = CapacityConfig(factor=factor, rounding="floor", multiple_of=2, choice_order=order)  # pyright: ignore[reportArgumentType]
        for part in (log, other):
            if part.header.layers:
                _drops_of(found, prefix, part, capacity, run.data.sequence_length)
        for control, change in (("permuted", permuted), ("uniform", uniform)):
            limited = count(apply_capacity(ChangedLog(log, change), capacity), tables=("drops",))
            for index, layer in limited.layers.items():
                rates = drop_rates(layer, per_domain=False, parts=QUARTERS, replicates=0)
                for quarter, value in enumerate(rates.table["value"].tolist(), start=1):
                    found.add(f"{prefix}drop_{control}.q{quarter}", index, 100 * value)
                found.add(f"{prefix}drop_{control}", index, 100 * rates.value)
    names = [f"drop.{domain}" for domain in in_domain(run)]
    for index in log.header.layers:
        for part in ("", *(f".q{quarter}" for quarter in range(1, QUARTERS + 1))):
            for prefix in CAPACITIES:
                values = [found.values.get(f"{prefix}{name}{part}.L{index}") for name in names]
                known = [value for value in values if isinstance(value, float)]
                if known:
                    found.add(f"{prefix}drop.in_domain{part}", index, statistics.fmean(known))


def _drops_of(found: _Found, prefix: str, log: RoutingLog, capacity: CapacityConfig, length: int) -> None:
    limited = count(apply_capacity(log, capacity), tables=("drops",), positions=length)
    for index, layer in limited.layers.items():
        quarters = drop_rates(layer, parts=QUARTERS)
        whole = drop_rates(layer, by="domain")
        for domain, rate in zip(whole.table["domain"].tolist(), whole.table["value"].tolist(), strict=True):
            name = f"{prefix}drop.{limited.header.domains[domain]}"
            found.add(name, index, 100 * rate)
            mine = quarters.table["domain"] == domain
            for quarter in range(QUARTERS):
                [row] = (mine & (quarters.table["label"] == quarter)).nonzero().flatten().tolist()
                found.add(f"{name}.q{quarter + 1}", index, 100 * float(quarters.table["value"][row]))
            if not prefix:
                places = drop_rates(layer, parts=min(PLACES, length), replicates=0)
                found.add_list(f"{name}.places", index, 100 * places.table["value"][places.table["domain"] == domain])


@dataclass(frozen=True)
class ChangedLog:
    """A log with other selections of the same tokens.

    Attributes:
        log: the log.
        change: makes the selections of some rows, (T, K); it is given a generator of random numbers too.
    """

    log: RoutingLog
    change: Callable[[Rows, int, np.random.Generator], Tensor]

    @property
    def header(self) -> TraceHeader:
        """Of the log."""
        return self.log.header

    def rows(self, layers: Collection[int] | None = None) -> Iterator[Rows]:
        """See `RoutingLog`."""
        generator = np.random.default_rng(0)
        for rows in self.log.rows(layers):
            experts = self.header.layers[rows.layer].num_experts
            yield replace(rows, choice_TK=self.change(rows, experts, generator).to(rows.choice_TK.dtype))


def permuted(rows: Rows, experts: int, generator: np.random.Generator) -> Tensor:
    """The selections of each document's tokens, in random order."""
    document_T = rows.tokens.document_T.numpy()
    shuffled_T = np.lexsort((generator.random(len(rows)), document_T))
    choice_TK = torch.empty_like(rows.choice_TK)
    choice_TK[torch.from_numpy(np.argsort(document_T, kind="stable"))] = rows.choice_TK[torch.from_numpy(shuffled_T)]
    return choice_TK


def uniform(rows: Rows, experts: int, generator: np.random.Generator) -> Tensor:
    """As many different experts for each token, all equally likely."""
    drawn_TN = generator.random((len(rows), experts)).argsort(axis=1)
    return torch.from_numpy(drawn_TN[:, : rows.choice_TK.shape[1]].copy())


def _development(
    found: _Found, trained: Trained, windows: Mapping[str, Tensor], final: RoutingLog, counts: RoutingCounts
) -> None:
    """How far each checkpoint already routes as the last model does, on the same text."""
    steps = sorted(trained.checkpoints)
    curves: dict[str, list[float]] = {}
    for step in steps:
        model = load_model(trained.checkpoints[step]).to(trained.model.device).eval()  # pyright: ignore[reportArgumentType]
        log, _ = trace_windows(model, windows)
        early = count(log, tables=("token", "position"))
        if step == 0:
            _specialisation(found, "start_", early)
        for index, saturation in router_saturation(log, final, replicates=0).items():
            change = distribution_change(early.layer(index), counts.layer(index), min_count=MIN_USES)
            for name, value in (
                ("saturation", saturation.value),
                ("saturation_corrected", saturation.values["corrected"]),
                ("saturation_first", saturation.values["rank_1"]),
                ("saturation_first_corrected", saturation.values["rank_1_corrected"]),
                ("cosine", change.values["cosine"]),
                ("jensen_shannon", change.values["jensen_shannon"]),
            ):
                curves.setdefault(f"{name}.L{index}", []).append(round(value, 6))
    found.values |= {"steps": [float(step) for step in steps], **curves}
    total = trained.run.train.steps
    warm_up = trained.run.train.schedule.warmup(total)
    for index in counts.layers:
        curve = curves[f"saturation.L{index}"]
        for name, step in (("warm_up", warm_up), ("quarter", total / 4), ("half", total / 2)):
            nearest = min(range(len(steps)), key=lambda place: abs(steps[place] - step))
            found.add(f"saturation.{name}", index, curve[nearest])
            found.add(f"saturation_corrected.{name}", index, curves[f"saturation_corrected.L{index}"][nearest])
        late = [value for step, value in zip(steps, curve, strict=True) if step >= total / 4]
        found.add("saturation.least_rise", index, min(np.diff(late)) if len(late) > 1 else 0.0)
