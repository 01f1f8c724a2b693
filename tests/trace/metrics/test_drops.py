"""Drops by place, turn and domain: rates, how many sequences they rest on, bands; capacity applied afterwards."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from tests.trace.models import tiny_model
from tests.trace.routing_logs import Log, columns, log_of, random_log

from moesaic.errors import ConfigError
from moesaic.layer import CapacityConfig
from moesaic.trace import apply_capacity, count, drop_rates, record


def test_rates_by_place_and_domain():
    dropped_TK = torch.tensor([[0, 0], [0, 1], [1, 1], [0, 0], [1, 0]]).bool()
    choice_TK = torch.tensor([[0, 1]] * 5)
    tokens = columns([1, 2, 3, 4, 5], [3, 2], domain=[1, 2], turn=[0, 0, 1, 0, 1])
    log = log_of(tokens, {0: choice_TK}, 2, dropped={0: dropped_TK}, domains=("", "code", "chat"))
    layer = count(log).layer(0)
    found = drop_rates(layer)
    rows = [(row["label"], row["domain"], row["count"], row["value"], row["unserved"]) for row in found.rows()]
    assert rows == [(0, 1, 1, 0, 0), (0, 2, 1, 0, 0), (1, 1, 1, 0.5, 0), (1, 2, 1, 0.5, 0), (2, 1, 1, 1, 1)]
    assert found.value == 0.4
    assert found.values["unserved"] == 0.2
    together = drop_rates(layer, per_domain=False)
    assert together.table["count"].tolist() == [2, 2, 1]
    assert together.table["value"].tolist() == [0, 0.5, 1]
    assert together.table["few"].tolist() == [1, 1, 1]
    domain = drop_rates(layer, by="domain", names=log.header.domains)
    assert domain.names == ("code", "chat")
    assert domain.table["value"].tolist() == [0.5, 0.25]
    assert domain.table["count"].tolist() == [1, 1]
    turn = drop_rates(layer, by="turn", per_domain=False)
    assert turn.table["value"].tolist() == [1 / 6, 3 / 4]
    assert turn.table["count"].tolist() == [2, 2]  # turns that began


def test_few_sequences_are_flagged_and_bands_rest_on_documents():
    generator = torch.Generator().manual_seed(0)
    lengths = [10] * 40 + [20] * 20
    tokens = columns(torch.zeros(sum(lengths), dtype=torch.int64), lengths)
    dropped_TK = torch.rand(len(tokens), 1, generator=generator) < 0.3
    layer = count(log_of(tokens, {0: torch.zeros(len(tokens), 1).long()}, 1, dropped={0: dropped_TK})).layer(0)
    found = drop_rates(layer)
    assert found.table["count"].tolist() == [60] * 10 + [20] * 10
    assert found.table["few"].tolist() == [0] * 10 + [1] * 10
    inside = (found.table["low"] <= found.table["value"]) & (found.table["value"] <= found.table["high"])
    assert inside.all()
    width = (found.table["high"] - found.table["low"])[:10].mean().item()
    # Sixty independent tokens of rate 0.3: 2 * 1.96 standard errors.
    assert width == pytest.approx(2 * 1.96 * math.sqrt(0.21 / 60), rel=0.15)
    assert found.band.low < found.value < found.band.high


def test_documents_that_drop_everything_make_wide_bands():
    """Tokens of a document fall together, so 1,000 of them say little: the band is that of 20 documents."""
    lengths = [50] * 20
    tokens = columns(torch.zeros(1000, dtype=torch.int64), lengths)
    dropped_TK = (tokens.document_T % 2 == 0).unsqueeze(-1)
    layer = count(log_of(tokens, {0: torch.zeros(1000, 1).long()}, 1, dropped={0: dropped_TK})).layer(0)
    band = drop_rates(layer).band
    assert band.high - band.low > 0.3


def test_drops_without_capacity_are_zero_and_null_picks_no_picks():
    choice_TK = torch.tensor([[0, 2], [2, 3]])
    layer = count(log_of(columns([1, 2]), {0: choice_TK}, 2, num_null=2)).layer(0)
    found = drop_rates(layer)
    assert not found.conventions["limited"]
    assert found.table["picks"].tolist() == [1, 0]
    assert found.rows()[1]["value"] is None  # nothing could drop
    assert found.table["unserved"].tolist() == [0, 1]


def test_what_was_not_counted_is_named():
    layer = count(random_log(0), tables=("token",)).layer(1)
    with pytest.raises(ConfigError, match="was not counted"):
        drop_rates(layer)
    with pytest.raises(ConfigError, match="parts"):
        drop_rates(count(random_log(0)).layer(1), parts=0)


@pytest.mark.parametrize("scope", ["sequence", "batch"])
@pytest.mark.parametrize("order", ["token_first", "rank_first"])
def test_afterwards_equals_the_layer_with_that_capacity(scope, order):
    """The model with a capacity in its layers drops what the log of the same model without one says it would."""
    capacity = CapacityConfig(factor=0.6, eval_factor=0.6, minimum=0, scope=scope, choice_order=order)
    # One MoE layer: with more, drops in the first would change what the second sees.
    spec = {"layers": {"first_dense": 2}}
    plain, limited = tiny_model(**spec), tiny_model(**spec, capacity=capacity.to_dict())
    limited.load_state_dict(plain.state_dict())
    ids = torch.randint(50, (4, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    logs = []
    for model in (plain, limited):
        with torch.no_grad(), record(model) as trace:
            model(ids, attention_mask=mask)
        logs.append(trace)
    rows = list(apply_capacity(logs[0], capacity, batch=4 if scope == "batch" else None).rows())
    expected = next(iter(logs[1].rows()))
    assert torch.equal(torch.cat([part.choice_TK for part in rows]), expected.choice_TK)
    assert torch.equal(torch.cat([part.dropped_TK for part in rows]), expected.dropped_TK)
    torch.testing.assert_close(torch.cat([part.weight_TK for part in rows]), expected.weight_TK)
    assert expected.dropped_TK.any()


def test_policies_that_compare_weights():
    log = log_of(columns([1, 2, 3]), {0: torch.zeros(3, 1).long()}, 1)
    log = Log(log.header, [replace(rows, weight_TK=torch.tensor([[0.1], [0.9], [0.5]])) for rows in log.rows()])
    capacity = CapacityConfig(factor=0.5, minimum=0, policy="weight")
    rows = next(iter(apply_capacity(log, capacity).rows()))
    assert rows.dropped_TK.squeeze(-1).tolist() == [True, False, False]
    with pytest.raises(ConfigError, match="scores"):
        apply_capacity(log, CapacityConfig(factor=0.5, policy="probability"))


@pytest.mark.parametrize(
    ("settings", "options", "message"),
    [
        ({"factor": None, "eval_factor": 1.0}, {}, "factor"),
        ({"factor": 1.0, "scope": "batch"}, {}, "batch"),
        ({"factor": 1.0}, {"batch": 4}, "batch"),
        ({"factor": 1.0, "scope": "batch"}, {"batch": 0}, "batch"),
    ],
)
def test_capacities_that_can_not_be_applied_are_named(settings, options, message: str):
    with pytest.raises(ConfigError, match=message):
        apply_capacity(random_log(0), CapacityConfig(**settings), **options)


def test_logs_of_decoding_are_refused():
    log = random_log(0, lengths=(4, 4), layers=(1,))
    rows = next(iter(log.rows()))
    log = Log(log.header, [rows[torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])]])
    with pytest.raises(ConfigError, match="place 0"):
        list(apply_capacity(log, CapacityConfig(factor=1.0)).rows())


def port(tokens: int, num_experts: int = 32) -> int:
    """Slots of OpenMoE's PyTorch code: floor(K cf N / E), even, at least 4."""
    config = CapacityConfig(factor=2.0, minimum=4, rounding="floor", multiple_of=2)
    return int(config.slots(torch.tensor(tokens), num_experts, 2, training=True))


def jax(tokens: int) -> int:
    """Slots of its JAX code: round(cf G / E), without K."""
    config = CapacityConfig(factor=1.25 / 2, minimum=0, rounding="nearest")
    return int(config.slots(torch.tensor(tokens), 32, 2, training=True))


def test_slots_of_openmoe():
    assert [port(tokens) for tokens in (1, 10, 37, 45, 100, 512, 2048)] == [4, 4, 4, 6, 12, 64, 256]
    assert [jax(tokens) for tokens in (4096, 64)] == [160, 2]
