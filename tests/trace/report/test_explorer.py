"""What the token explorer is given: recorded picks, exactly."""

from __future__ import annotations

from base64 import b64decode

import numpy as np
import pytest
import torch
from tests.trace.report.reading import Tokenizer, make_trace

from moesaic.trace import RoutingTrace
from moesaic.trace.report import make_report
from moesaic.trace.report.documents import chosen_documents


@pytest.fixture(scope="module")
def trace() -> RoutingTrace:
    return make_trace(tokens=40)


def test_texts_hold_the_picks_of_the_trace(trace: RoutingTrace):
    documents = {document.number: document for document in chosen_documents(trace)}
    order = {layer: index for index, layer in enumerate(sorted(trace.layers))}
    seen = 0
    for rows in trace.rows():
        for number in rows.tokens.document_T.unique().tolist():
            of_T = rows.tokens.document_T == number
            document = documents[number]
            np.testing.assert_array_equal(document.choice_LTK[order[rows.layer]], rows.choice_TK[of_T].numpy())
            np.testing.assert_array_equal(document.weight_LTK[order[rows.layer]], rows.weight_TK[of_T].numpy())
            np.testing.assert_array_equal(document.token_T, rows.tokens.token_T[of_T].numpy())
            seen += 1
    assert seen == 2 * len(documents)


def test_texts_of_all_domains_share_the_budget():
    trace = make_trace(tokens=100, domains=("a", "b", "a", "a", "c"))
    documents = chosen_documents(trace, budget=150 * 2 * (4 * 2 + 1), longest=60)
    assert [document.domain for document in documents] == [2, 3, 1]  # b and c have less text than a
    assert [len(document.token_T) for document in documents] == [60, 60, 30]
    assert {document.length for document in documents} == {100}
    assert len(chosen_documents(trace, most=2)) == 2
    assert [len(document.token_T) for document in chosen_documents(trace, budget=1)] == [1]


def test_the_page_holds_picks_and_weights(trace: RoutingTrace):
    texts = make_report(trace, title="x", tokenizer=Tokenizer()).texts
    rows = next(trace.rows())
    document = next(item for item in texts["documents"] if item["number"] == 0)
    choice = np.frombuffer(b64decode(document["choice"]), dtype=np.uint8).reshape(2, 40, 2)
    np.testing.assert_array_equal(choice[0], rows.choice_TK.numpy())
    steps = np.frombuffer(b64decode(document["weight"]), dtype="<u2").reshape(2, 40, 2)
    weight_TK = steps[0] / 65_535 * texts["layers"][0]["scale"]
    np.testing.assert_allclose(weight_TK, rows.weight_TK.numpy(), atol=2e-5)
    assert [texts["ids"][token] for token in document["tokens"]] == rows.tokens.token_T.tolist()
    share_TK = rows.weight_TK.double() / rows.weight_TK.double().sum(-1, keepdim=True)
    entropy_T = torch.special.entr(share_TK).sum(-1) / np.log(2)
    stored_T = np.frombuffer(b64decode(document["entropy"]), dtype=np.uint8).reshape(2, 40)[0] / 255
    np.testing.assert_allclose(stored_T, entropy_T.numpy(), atol=0.003)
