"""Statistics of routers: experts per token, nulls, drops, the influence of a state, and what is shown of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rich.console import Console
from tests.trace.models import tiny_model

from moesaic.errors import ConfigError
from moesaic.hf import MoesaicForCausalLM
from moesaic.trace import (
    StatisticsTables,
    account,
    record,
    router_statistics,
    trace_batches,
    watch_state,
    write_report,
)

IDS = torch.tensor([[3, 4, 3, 5, 3, 4, 6, 7], [8, 3, 3, 4, 9, 3, 5, 3]])


def traced(model: MoesaicForCausalLM, mask: torch.Tensor | None = None):
    with torch.no_grad(), watch_state(model) as influence, record(model) as trace:
        model(IDS, attention_mask=mask)
    return router_statistics(model, trace, influence), trace


def printed(statistics) -> str:
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(StatisticsTables(statistics))
    return " ".join(console.export_text().split())


def test_plain_routers_run_as_many_experts_for_every_token() -> None:
    statistics, _ = traced(tiny_model())
    assert [row.layer for row in statistics] == [1, 2]
    for row in statistics:
        assert (row.router, row.experts_mean, row.experts_std) == ("top_k", 2.0, 0.0)
        assert (row.null_share, row.drop_rate, row.unserved, row.drops_by_position) == (0.0, 0.0, 0.0, [])
        assert row.state_influence is None
        assert row.readings == {}
        assert all(bucket.experts == 2.0 for bucket in row.by_frequency)
    text = printed(statistics)
    assert "2.00 ± 0.00" in text
    assert "by its frequency" not in text


def test_null_experts_show_in_every_number() -> None:
    model = tiny_model(router={"type": "null_experts", "top_k": 3, "num_null": 6, "linear_bias": True})
    statistics, trace = traced(model)
    for row in statistics:
        layer = trace.layers[row.layer]
        experts_T = (layer.index_TK < 6).sum(-1).double()
        assert row.experts_mean == pytest.approx(float(experts_T.mean()))
        assert row.experts_std == pytest.approx(float(experts_T.std(correction=0)))
        assert row.null_share == pytest.approx(1 - row.experts_mean / 3)
        assert row.unserved == pytest.approx(float((experts_T == 0).double().mean()))
        assert row.readings.keys() == {"bias least", "bias most"}
        weighted = sum(bucket.tokens * bucket.experts for bucket in row.by_frequency)
        assert weighted == pytest.approx(float(experts_T.sum()))
    assert any(row.experts_std > 0 for row in statistics)
    assert "Experts per token by its frequency" in printed(statistics)


def test_drops_are_counted_by_quarters_of_the_positions() -> None:
    capacity = {"factor": 0.5, "eval_factor": 0.5, "minimum": 1, "scope": "sequence", "policy": "position"}
    statistics, trace = traced(tiny_model(capacity=capacity))
    for row in statistics:
        assert row.drop_rate == pytest.approx(trace.layers[row.layer].dropped / (IDS.numel() * 2))
        assert len(row.drops_by_position) == 4
        assert (
            row.drops_by_position[0] == 0.0
        )  # the first two tokens of a sequence find every expert empty or half full
        assert row.drops_by_position[3] > row.drops_by_position[0]
    assert "Dropped by position" in printed(statistics)


def test_influence_is_the_share_of_picks_that_the_state_decided() -> None:
    model = tiny_model(router={"type": "recurrent", "top_k": 2, "state_size": 5})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".gate." in name:
                parameter.normal_()
    mask = torch.ones_like(IDS)
    mask[0, 6:] = 0
    statistics, trace = traced(model, mask)
    assert statistics[0].state_influence == 0.0  # the first MoE layer has nothing below it
    # By hand: the second layer once more, without the first one's record.
    with torch.no_grad():
        context = model(IDS, attention_mask=mask, output_routing=True).routing
        hidden = {}
        handle = model.moe_blocks()[2].gate.register_forward_hook(lambda _, args, __: hidden.update(x=args[0]))
        model(IDS, attention_mask=mask)
        handle.remove()
        alone = model.moe_blocks()[2].gate(hidden["x"])
    with_state, without = context.records[2].index_TK, alone.index_TK
    real = mask.flatten().bool()
    kept = sum(
        len(set(first) & set(second))
        for first, second in zip(with_state[real].tolist(), without[real].tolist(), strict=True)
    )
    assert statistics[1].state_influence == pytest.approx(1 - kept / (2 * int(real.sum())))
    assert statistics[1].state_influence is not None
    assert 0 < statistics[1].state_influence <= 1
    assert trace.num_tokens == int(real.sum())


def test_cut_state_decides_nothing_and_is_not_measured() -> None:
    model = tiny_model(router={"type": "recurrent", "top_k": 2, "state_size": 5, "mode": "no_passing"})
    statistics, _ = traced(model)
    assert [row.state_influence for row in statistics] == [None, None]


def test_watching_changes_nothing_and_ends() -> None:
    model = tiny_model(router={"type": "recurrent", "top_k": 2, "state_size": 5})
    with torch.no_grad():
        expected = model(IDS).logits
        with watch_state(model):
            assert torch.equal(model(IDS).logits, expected)
        assert all(not block.gate._forward_hooks for block in model.moe_blocks().values())


def test_trace_of_another_model_is_refused() -> None:
    _, trace = traced(tiny_model())
    with pytest.raises(ConfigError, match=r"trace = \[1, 2\] has other layers than the model \(\[0\]\)"):
        router_statistics(tiny_model(layers={"only": [0]}), trace)


def test_report_shows_what_there_is(tmp_path: Path) -> None:
    model = tiny_model(router={"type": "null_experts", "top_k": 3, "num_null": 6})
    documents = torch.zeros_like(IDS)
    trace = trace_batches(model, {"text": [{"input_ids": IDS, "document_ids": documents}]}, max_tokens=100)
    statistics = router_statistics(model, trace)
    page = write_report(tmp_path / "page.html", trace, account(model), title="nulls", statistics=statistics).read_text()
    assert 'id="routers"' in page
    assert "Experts per token by frequency" in page
    assert "Drops by position" not in page
    plain = write_report(tmp_path / "plain.html", trace, account(model), title="nulls").read_text()
    assert 'id="routers"' not in plain
