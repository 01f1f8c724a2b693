from __future__ import annotations

import torch
from tests.trace.models import tiny_model

from moesaic.layer import Routing, RoutingContext
from moesaic.trace import record
from moesaic.trace.numbering import DocumentNumbering


def context(batch: int, length: int, position: list[list[int]] | None = None, mask: list[list[int]] | None = None):
    tokens = batch * length
    found = RoutingContext(
        batch_size=batch,
        position_T=None if position is None else torch.tensor(position).flatten(),
        mask_T=None if mask is None else torch.tensor(mask).flatten().bool(),
    )
    zero = torch.zeros(tokens, 2)
    found.commit(0, Routing(torch.zeros(tokens, 1, dtype=torch.int64), zero[:, :1], zero, zero, zero))
    return found


def test_every_row_is_a_document():
    numbering = DocumentNumbering()
    assert numbering.columns(context(2, 3)).document_T.tolist() == [0, 0, 0, 1, 1, 1]
    again = numbering.columns(context(2, 3), domain=4)
    assert again.document_T.tolist() == [2, 2, 2, 3, 3, 3]
    assert again.place_T.tolist() == again.position_T.tolist() == [0, 1, 2, 0, 1, 2]
    assert set(again.domain_T.tolist()) == {4}


def test_packed_documents_are_told_apart_by_their_positions():
    columns = DocumentNumbering().columns(context(2, 5, [[0, 1, 0, 1, 2], [0, 0, 1, 0, 0]]))
    assert columns.document_T.tolist() == [0, 0, 1, 1, 1, 2, 3, 3, 4, 5]
    assert columns.position_T.tolist() == [0, 1, 0, 1, 2, 0, 0, 1, 0, 0]
    assert columns.place_T.tolist() == [0, 1, 2, 3, 4] * 2


def test_padding_takes_no_place():
    columns = DocumentNumbering().columns(context(2, 4, mask=[[0, 0, 1, 1], [1, 1, 1, 0]]))
    assert columns.document_T.tolist() == [0, 0, 1, 1, 1]
    assert columns.place_T.tolist() == [0, 1, 0, 1, 2]


def test_generation_goes_on_with_its_documents():
    numbering = DocumentNumbering()
    numbering.columns(context(2, 3, [[1, 0, 1], [0, 1, 2]], [[0, 1, 1], [1, 1, 1]]))
    step = numbering.columns(context(2, 1, [[2], [3]]))
    assert step.document_T.tolist() == [0, 1]
    assert step.position_T.tolist() == step.place_T.tolist() == [2, 3]
    assert numbering.columns(context(2, 1, [[3], [4]])).document_T.tolist() == [0, 1]
    assert numbering.columns(context(2, 2, [[0, 1], [0, 1]])).document_T.tolist() == [2, 2, 3, 3]


def test_a_model_that_generates_makes_one_document_of_a_prompt_and_its_continuation():
    model = tiny_model()
    ids = torch.arange(20).view(2, 10)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    with record(model) as trace:
        model.generate(ids, attention_mask=mask, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
    rows = list(trace.rows({1}))
    document_T = torch.cat([part.tokens.document_T for part in rows])
    place_T = torch.cat([part.tokens.place_T for part in rows])
    assert document_T.bincount().tolist() == [13, 10]
    for document, tokens in ((0, 13), (1, 10)):
        assert place_T[document_T == document].tolist() == list(range(tokens))
