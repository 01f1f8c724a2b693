"""Arrays of routed experts, as inference servers return them, from traces and as traces."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.trace.models import LAYERS, tiny_model
from torch import Tensor

import moesaic
from moesaic.errors import ConfigError, TraceError
from moesaic.hf import MoesaicForCausalLM
from moesaic.trace import (
    RoutingTrace,
    count,
    encode_routed_experts,
    facts_of,
    from_routed_experts,
    to_routed_experts,
    write_report,
)

DECODER_LAYERS = 3  # of which the first is dense


def texts() -> Tensor:
    return torch.randint(3, 50, (2, 7), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def model() -> MoesaicForCausalLM:
    return tiny_model()


@pytest.fixture(scope="module")
def trace(model: MoesaicForCausalLM) -> RoutingTrace:
    with moesaic.record(model) as trace, torch.no_grad():
        model(texts())
    return trace


def npy(array: np.ndarray) -> str:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return base64.b64encode(buffer.getvalue()).decode()


def test_an_array_holds_the_picks_by_token_and_layer(trace: RoutingTrace) -> None:
    array = to_routed_experts(trace, 1)
    assert array.shape == (7, len(LAYERS), 2)
    assert array.dtype == np.int32
    for place, layer in enumerate(LAYERS):
        assert (array[:, place] == trace.layers[layer].index_TK[7:].numpy()).all()
    whole = to_routed_experts(trace, 1, num_layers=DECODER_LAYERS)
    assert not whole[:, 0].any()
    assert (whole[:, 1:] == array).all()


@pytest.mark.parametrize("form", ["array", "moe_layers", "tensor", "lists", "uint8", "npy", "base64"])
@pytest.mark.parametrize("sampled_last", [False, True])
def test_round_trip(model: MoesaicForCausalLM, trace: RoutingTrace, form: str, sampled_last: bool) -> None:
    num_layers = None if form == "moe_layers" else DECODER_LAYERS
    arrays: list[Any] = [to_routed_experts(trace, document, num_layers=num_layers) for document in range(2)]
    ids = texts()
    if sampled_last:
        ids = torch.cat([ids, ids[:, :1]], dim=1)
    convert: dict[str, Any] = {
        "tensor": torch.from_numpy,
        "lists": np.ndarray.tolist,
        "uint8": lambda array: array.astype(np.uint8),
        "npy": lambda array: npy(array.astype(np.uint8)),
        "base64": encode_routed_experts,
    }
    given = [convert.get(form, np.asarray)(array) for array in arrays]
    imported = from_routed_experts(given, list(ids), header=facts_of(model))
    for document in range(2):
        again = to_routed_experts(imported, document, num_layers=num_layers)
        assert (again == arrays[document]).all()
    for layer in LAYERS:
        assert (count(imported).layers[layer].load_N == trace.layers[layer].load_N).all()


def test_an_imported_trace_is_replayed_with_weights_of_the_router(
    model: MoesaicForCausalLM, trace: RoutingTrace
) -> None:
    arrays = [to_routed_experts(trace, document, num_layers=DECODER_LAYERS) for document in (1, 0)]
    imported = from_routed_experts(arrays, texts()[[1, 0]].tolist(), header=facts_of(model))
    with moesaic.replay(model, imported, documents=[1, 0]):
        output = model(texts())
    torch.testing.assert_close(output.logits, model(texts()).logits, rtol=1e-5, atol=1e-6)
    with pytest.raises(ConfigError, match='choose weights="router"'), moesaic.replay(model, imported, weights="trace"):
        pass


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_an_imported_trace_is_reported_on(model: MoesaicForCausalLM, trace: RoutingTrace, tmp_path: Path) -> None:
    arrays = [to_routed_experts(trace, document) for document in range(2)]
    imported = from_routed_experts(arrays, texts().tolist(), header=facts_of(model))
    page = write_report(tmp_path / "report.html", imported, title="rollout").read_text(encoding="utf-8")
    assert "rollout" in page
    assert "NaN" not in page


def test_tokens_that_came_from_a_cache_are_left_out(model: MoesaicForCausalLM, trace: RoutingTrace) -> None:
    array = to_routed_experts(trace, 0, num_layers=DECODER_LAYERS)
    array[:3] = -1
    imported = from_routed_experts([array], [texts()[0]], header=facts_of(model))
    assert all(rows.tokens.position_T.tolist() == [3, 4, 5, 6] for rows in imported.rows())
    with pytest.raises(TraceError, match="document 0, position 0 "), moesaic.replay(model, imported):
        model(texts()[:1])


def test_arrays_of_a_part_start_where_it_is_said(model: MoesaicForCausalLM, trace: RoutingTrace) -> None:
    array = to_routed_experts(trace, 0)[4:]
    imported = from_routed_experts([array], [texts()[0, 4:]], header=facts_of(model), starts=[4])
    assert next(imported.rows()).tokens.position_T.tolist() == [4, 5, 6]
    assert next(imported.rows()).tokens.token_T.tolist() == texts()[0, 4:].tolist()


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((7, 2), int), r"shape \(7, 2\) .*\(tokens, layers, picks\)"),
        (np.zeros((7, 2, 2)), "float64 are not whole numbers"),
        (np.zeros((5, 2, 2), int), "of 5 tokens, and there are 7 token ids"),
        (np.zeros((7, 1, 2), int), "of 1 layers, and the model has 2 MoE layers, the last of them layer 2"),
        (np.zeros((7, 2, 3), int), "have 3 picks for each token, and the model makes 2"),
        (np.full((7, 2, 2), 6), "expert 6 is not one of the 6"),
        ("no base64!", "neither the base64 form"),
        (encode_routed_experts(np.zeros(13)), "13 numbers are no whole number of layers for 7 tokens"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(model: MoesaicForCausalLM, array: Any, message: str) -> None:
    with pytest.raises(TraceError, match=message):
        from_routed_experts([array], [texts()[0]], header=facts_of(model))


def test_other_refusals(model: MoesaicForCausalLM, trace: RoutingTrace) -> None:
    with pytest.raises(TraceError, match="1 arrays of routed experts, and 2 lists"):
        from_routed_experts([np.zeros((7, 2, 2), int)], list(texts()), header=facts_of(model))
    with pytest.raises(TraceError, match="holds no document 5"):
        to_routed_experts(trace, 5)
    with pytest.raises(TraceError, match="no place for MoE layer 2"):
        to_routed_experts(trace, 0, num_layers=2)
    tight = tiny_model(capacity={"factor": 0.5, "eval_factor": 0.5, "minimum": 1})
    with moesaic.record(tight) as dropped:
        tight(texts())
    with pytest.raises(TraceError, match="dropped by a capacity"):
        to_routed_experts(dropped, 0)
