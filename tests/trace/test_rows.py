from __future__ import annotations

import pytest
import torch
from tests.trace.models import NUM_EXPERTS, TOP_K, tiny_model

from moesaic.errors import ConfigError
from moesaic.layer import Routing
from moesaic.trace import record
from moesaic.trace.rows import NOTHING, TokenColumns, rows_of

IDS = torch.arange(20).view(2, 10)


def test_rows_hold_what_the_router_chose_layer_by_layer():
    model = tiny_model()
    with record(model) as trace, trace.domain("text"):
        expected = model(IDS, output_routing=True).routing
        model(IDS[:1])
    found = list(trace.rows())
    assert [rows.layer for rows in found] == [*trace.layers, *trace.layers]
    assert [len(rows) for rows in found[:: len(trace.layers)]] == [20, 10]
    for rows in found[: len(trace.layers)]:
        assert torch.equal(rows.index_TK(NUM_EXPERTS), expected.records[rows.layer].index_TK)
        assert rows.tokens.token_T.tolist() == list(range(20))
        assert rows.tokens.document_T.tolist() == [0] * 10 + [1] * 10
        assert rows.tokens.position_T.tolist() == rows.tokens.place_T.tolist() == [*range(10)] * 2
        assert trace.header.domains[int(rows.tokens.domain_T[0])] == "text"
    assert set(found[-1].tokens.document_T.tolist()) == {2}
    assert [rows.layer for rows in trace.rows({2})] == [2, 2]


def test_the_header_says_what_was_traced():
    model = tiny_model()
    with record(model) as trace:
        model(IDS)
    header = trace.header
    assert header.layers[1].num_experts == NUM_EXPERTS
    assert header.layers[1].top_k == TOP_K
    assert header.layers[1].router == "top_k"
    assert header.vocab_size == model.config.get_text_config().vocab_size


def test_counts_have_no_rows():
    model = tiny_model()
    with record(model, keep="counts") as trace:
        model(IDS)
    with pytest.raises(ConfigError, match="keep='tokens'"):
        next(trace.rows())


def test_selections_come_in_the_order_of_what_was_compared():
    routing = Routing(
        index_TK=torch.tensor([[2, 0], [4, 1], [4, 4]]),
        weight_TK=torch.tensor([[0.2, 0.7], [0.0, 0.4], [0.0, 0.0]]),
        logits_TN=torch.zeros(3, 5),
        scores_TN=torch.zeros(3, 5),
        selection_TN=torch.tensor([[0.9, 0, 0.3, 0, 0], [0, 0.5, 0, 0, 0.2], [0, 0, 0, 0.0, 1.0]]),
        num_null=1,
        chosen_TK=torch.tensor([[2, 0], [4, 1], [5, 4]]),
        dropped_TK=torch.tensor([[False, True], [False, False], [False, False]]),
    )
    tokens = TokenColumns(*[torch.zeros(3, dtype=torch.int64)] * 7)
    rows = rows_of(7, routing, tokens, None)
    assert rows.choice_TK.tolist() == [[0, 2], [1, 4], [4, NOTHING]]
    torch.testing.assert_close(rows.weight_TK, torch.tensor([[0.7, 0.2], [0.4, 0.0], [0.0, 0.0]]))
    assert rows.dropped_TK is not None
    assert rows.dropped_TK.tolist() == [[True, False], [False, False], [False, False]]
    assert rows.index_TK(4).tolist() == [[4, 2], [1, 4], [4, 4]]
    assert rows[torch.tensor([True, False, True])].choice_TK.tolist() == [[0, 2], [4, NOTHING]]
