"""Sections say what the metrics say."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from tests.trace.models import tiny_model
from tests.trace.report.reading import SyntheticLog, Tokenizer, make_trace

from moesaic.errors import TraceError
from moesaic.trace import RoutingTrace, count, record
from moesaic.trace.metrics import (
    domain_specialisation,
    drop_rates,
    group_information,
    nulls_by_frequency,
    router_saturation,
    routing_deviation,
)
from moesaic.trace.report import Named, Report, make_report


def trace_of(seed: int = 0, *, lengths: tuple[int, ...] = (40,), **spec: Any) -> RoutingTrace:
    """The same texts through a small model whose routers come from `seed`."""
    model = tiny_model(**spec)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".gate." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.std())
    texts = torch.Generator().manual_seed(7)
    with torch.no_grad(), record(model) as trace:
        for domain in ("code", "prose"):
            with trace.domain(domain):
                for length in lengths:
                    model(torch.randint(0, 9, (3, length), generator=texts))
    return trace


def table(report: Report, name: str) -> list[list[Any]]:
    return report.to_dict()["tables"][name]["rows"]


def close(cells: list[Any], values: list[float]) -> bool:
    return cells == pytest.approx(values, rel=1e-5, nan_ok=True)


def test_specialisation_is_that_of_the_metrics():
    trace = make_trace(tokens=400)
    report = make_report(trace, title="x", tokenizer=Tokenizer())
    counts = count(trace)
    for row, layer in zip(table(report, "deviation"), counts.layers.values(), strict=True):
        ids = routing_deviation(layer, "token", min_count=32)
        places = routing_deviation(layer, "position")
        assert close(row[1:5], [ids.value, ids.reference, ids.values["relative"], ids.values["excess"]])
        assert close(row[6:8], [places.value, places.reference])
    for row, layer in zip(table(report, "information"), counts.layers.values(), strict=True):
        known = group_information(layer, "token")
        assert close(row[1:3], [known.value, known.reference])
    shares = domain_specialisation(counts.layer(1)).matrix_GM
    assert shares is not None
    for expert, row in enumerate(table(report, "domains-layer-1")):
        assert close(row, [expert, *shares[:, expert].tolist()])
    best = table(report, "token-deviation-layer-1")
    assert [row[3] for row in best] == sorted((row[3] for row in best), reverse=True)


def test_saturation_is_that_of_the_metric_and_one_against_itself():
    early, middle, final = (trace_of(seed) for seed in (1, 2, 0))
    checkpoints = [Named("a", early, 10), Named("b", middle, 200), Named("c", final, 3000)]
    report = make_report(final, title="x", checkpoints=checkpoints)
    rows = table(report, "saturation-layers")
    for number, checkpoint in enumerate(checkpoints):
        found = router_saturation(checkpoint.log, final)
        assert close([row[1 + number] for row in rows], [result.value for result in found.values()])
    assert [row[3] for row in rows] == [1.0, 1.0]
    assert table(report, "routing-change")[-1][2] == pytest.approx(0.0, abs=1e-9)
    assert table(report, "saturation")[0][:2] == ["a", 10]


def test_drops_are_those_of_the_metric():
    log = SyntheticLog(layers=3, experts=12, top_k=3, documents=6, length=40)
    report = make_report(log, title="x")
    counts = count(log)
    for row, layer in zip(table(report, "drops-by-domain"), counts.layers.values(), strict=True):
        assert close(row[:2], [layer.layer, drop_rates(layer, by="domain").value])
    rows = table(report, "drops-by-place-layer-1")
    dropped = sum(row[4] for row in rows)
    assert dropped == counts.layer(1).dropped > 0
    assert all(row[4] == 0 for row in rows if row[1] < 30)
    assert {row[8] for row in rows} == {"few"}
    assert "drops" not in {section.name for section in make_report(make_trace(), title="x").sections}


def test_drops_by_turn():
    trace = trace_of(capacity={"factor": 0.6, "eval_factor": 0.6})
    for layer in trace.layers.values():
        for rows in layer.rows:
            object.__setattr__(rows.tokens, "turn_T", (rows.tokens.position_T // 20).to(torch.int16))
    rows = table(make_report(trace, title="x"), "drops-by-turn-layer-1")
    assert [row[0] for row in rows] == [0, 1]
    assert sum(row[3] for row in rows) == trace.layers[1].dropped > 0


def test_null_experts_are_those_of_the_metric():
    trace = trace_of(router={"type": "null_experts", "top_k": 3, "num_null": 4})
    report = make_report(trace, title="x")
    for row, layer in zip(table(report, "nulls"), count(trace).layers.values(), strict=True):
        result = nulls_by_frequency(layer)
        assert close(row[:3], [layer.layer, result.value, result.reference])
        assert row[4] == 4
    picks = report.texts["layers"][0]
    assert (picks["experts"], picks["nulls"]) == (6, 4)
    assert "null 6" in [str(row[0]) for row in table(report, "coactivation-layer-1")]


def test_a_renumbered_model_agrees_once_experts_are_matched():
    trace = trace_of(lengths=(60, 60, 60))
    order = torch.tensor([3, 0, 5, 1, 2, 4])
    other = trace_of(lengths=(60, 60, 60))
    for layer in other.layers.values():
        for rows in layer.rows:
            object.__setattr__(rows, "choice_TK", order[rows.choice_TK.long()].to(rows.choice_TK.dtype))
    report = make_report(trace, title="x", other=Named("other", other))
    for row in table(report, "compare-agreement"):
        assert row[1] < 0.7
        assert row[2] == 1.0
    for row in table(report, "compare-load"):
        assert {cell for cell in row[1:] if cell is not None} == {1.0}
    partners = [row[1] for row in table(report, "compare-experts-layer-1")]
    assert partners == order.tolist()


def test_models_of_other_shape_are_compared_by_layer_only():
    report = make_report(trace_of(), title="x", other=Named("large", SyntheticLog(layers=2, experts=9, top_k=2)))
    names = {figure.name for figure in report.figures}
    assert "compare-balance" in names
    assert "compare-agreement" not in names
    rows = table(report, "compare-balance")
    assert [row[0] for row in rows] == ["x", "x", "large", "large"]
    section = next(section for section in report.sections if section.name == "compare")
    assert "can't be compared one by one" in section.notes[0]


def test_traces_of_other_text_or_shape_are_refused():
    with pytest.raises(TraceError, match=r"trace both checkpoints on the same text|trace the same text"):
        make_report(trace_of(), title="x", checkpoints=[Named("a", trace_of(lengths=(30,)), 1)])
    with pytest.raises(TraceError, match="compare traces of one"):
        make_report(trace_of(), title="x", checkpoints=[Named("a", SyntheticLog(layers=2, experts=9, top_k=2), 1)])


def test_special_tokens_are_left_out_of_all_but_the_explorer():
    tokenizer = Tokenizer()
    tokenizer.all_special_ids = (3,)
    trace = make_trace()
    report = make_report(trace, title="x", tokenizer=tokenizer)
    ids_T = trace.token_ids_T
    assert ids_T is not None
    assert report.subject.num_tokens == int((ids_T != 3).sum())
    assert 3 in report.texts["ids"]
    assert any("special" in note for section in report.sections for note in section.notes)


def test_all_plots_are_named_and_say_how_to_read_them():
    log = SyntheticLog(layers=2, experts=8, top_k=2, documents=4, length=40)
    report = make_report(log, title="x", checkpoints=[Named("a", log, 1)], other=Named("b", log))
    names = [figure.name for figure in report.figures]
    assert len(names) == len(set(names)) > 20
    for figure in report.figures:
        assert re.fullmatch(r"[a-z0-9-]+", figure.name)
        assert figure.how.endswith(".")
        assert figure.table.rows


@pytest.mark.parametrize("tokens", [1, 2, 7])
def test_a_short_text_makes_a_page(tokens: int):
    """A prompt of a few words: most statistics are undefined, and the page says so instead of failing."""
    report = make_report(make_trace(tokens=tokens, domains=("prompt",)), title="x", tokenizer=Tokenizer())
    html = report.to_html()
    assert "NaN" not in html
    assert len(report.texts["documents"][0]["tokens"]) == tokens
