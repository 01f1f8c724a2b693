"""A replayed model computes what it computed when it was recorded, whatever its routers would pick now."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from tests.hf.router_models import extras, inputs, router_model
from tests.layer.router_rows import ROUTERS
from tests.trace.models import LAYERS, NUM_EXPERTS, tiny_model
from torch import Tensor

import moesaic
from moesaic.errors import ConfigError, TraceError, UnsupportedModel, UnsupportedOverride
from moesaic.hf import MoesaicForCausalLM
from moesaic.trace import LayerFacts, RoutingTrace, Rows, TraceFile

NO_PICKS = {name for name in ROUTERS if name.startswith(("merged", "segment_", "mixture_of", "soft_slots"))}
NO_WEIGHTS = {"random_skip"}
IDENTITY = {"longcat_flash"}
close: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-7}


def ids(batch: int = 2, length: int = 9, seed: int = 1) -> Tensor:
    return torch.randint(3, 50, (batch, length), generator=torch.Generator().manual_seed(seed))


def recorded(model: MoesaicForCausalLM, **given: Any) -> tuple[RoutingTrace, Any]:
    with moesaic.record(model) as trace:
        output = model(**given)
    return trace, output


def gradients(model: torch.nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


def other_gates(model: MoesaicForCausalLM) -> MoesaicForCausalLM:
    """The same model, whose routers would pick other experts."""
    model = copy.deepcopy(model)
    for block in model.moe_blocks().values():
        block.gate.get_parameter("weight").data.neg_()
    return model


# --- Every router -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ROUTERS)
def test_outputs_and_gradients_of_every_router_are_those_recorded(name: str) -> None:
    model = router_model(name).train()
    given = inputs()
    given |= extras(model, given["input_ids"])
    labels = given["input_ids"]
    torch.manual_seed(7)
    trace, output = recorded(model, **given, labels=labels)
    if name in NO_PICKS:
        with pytest.raises(UnsupportedOverride, match="no picks"), moesaic.replay(model, trace):
            pass
        return
    expected = gradients(model, output.loss)
    if name in NO_WEIGHTS:
        with pytest.raises(UnsupportedOverride, match='weights="trace"'), moesaic.replay(model, trace):
            pass
    else:
        torch.manual_seed(7)
        with moesaic.replay(model, trace):
            again = model(**given, labels=labels)
        torch.testing.assert_close(again.loss, output.loss, **close)
        torch.testing.assert_close(again.logits, output.logits, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(gradients(model, again.loss), expected, rtol=1e-4, atol=1e-6)
    if name in IDENTITY:
        with pytest.raises(ConfigError, match="null experts"), moesaic.replay(model, trace, weights="trace"):
            pass
        return
    torch.manual_seed(7)
    with moesaic.replay(model, trace, weights="trace"), torch.no_grad():
        again = model(**given)
    torch.testing.assert_close(again.logits, output.logits, rtol=1e-4, atol=1e-5)


# --- Where the picks are not the router's own -------------------------------------------------------------------------


def test_picks_of_the_trace_are_used_and_weighed_by_the_present_router() -> None:
    model = tiny_model()
    trace, output = recorded(model, input_ids=ids())
    changed = other_gates(model)
    with moesaic.replay(changed, trace), moesaic.record(changed) as again:
        present = changed(ids())
    for layer in LAYERS:
        assert torch.equal(again.layers[layer].index_TK.sort(-1).values, trace.layers[layer].index_TK.sort(-1).values)
    assert not torch.allclose(present.logits, output.logits)
    weight = changed.moe_blocks()[LAYERS[0]].gate.get_parameter("weight")
    present.logits.square().mean().backward()
    assert weight.grad is not None
    assert weight.grad.norm() > 0


def test_stored_weights_make_the_output_independent_of_the_gate() -> None:
    model = tiny_model()
    trace, output = recorded(model, input_ids=ids())
    changed = other_gates(model)
    with moesaic.replay(changed, trace, weights="trace"):
        present = changed(ids())
    torch.testing.assert_close(present.logits, output.logits, **close)
    present.logits.square().mean().backward()
    gates = [block.gate.get_parameter("weight").grad for block in changed.moe_blocks().values()]
    assert all(grad is None or not grad.any() for grad in gates)


@pytest.mark.parametrize("reentrant", [None, False, True], ids=["kept", "non_reentrant", "reentrant"])
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
def test_layers_recomputed_after_the_block_have_the_picks_of_their_forward_pass(reentrant: bool | None) -> None:
    model = tiny_model(balance=[{"type": "load_balancing", "coefficient": 0.1}]).train()
    trace, _ = recorded(model, input_ids=ids())
    changed = other_gates(model)
    with moesaic.replay(changed, trace):
        output = changed(ids(), labels=ids())
        expected = gradients(changed, output.loss)
    if reentrant is not None:
        changed.gradient_checkpointing_enable({"use_reentrant": reentrant})
        changed.enable_input_require_grads()
    with moesaic.replay(changed, trace):
        loss = changed(ids(), labels=ids()).loss
    assert torch.equal(loss, output.loss)
    torch.testing.assert_close(gradients(changed, loss), expected, rtol=1e-5, atol=1e-7)


def test_other_batches_padding_and_order() -> None:
    model = tiny_model()
    texts = [ids(1, length, seed=length)[0] for length in (9, 4, 7)]
    with moesaic.record(model) as trace, torch.no_grad():
        expected = [model(text.unsqueeze(0)).logits[0] for text in texts]
    changed = other_gates(model)
    order = (2, 0, 1)
    batch = torch.zeros(3, 9, dtype=torch.int64)
    mask = torch.zeros(3, 9, dtype=torch.int64)
    for row, text in enumerate(order):
        batch[row, -len(texts[text]) :], mask[row, -len(texts[text]) :] = texts[text], 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with moesaic.replay(changed, trace, weights="trace", documents=order), torch.no_grad():
        logits = changed(batch, attention_mask=mask, position_ids=positions).logits
    for row, text in enumerate(order):
        torch.testing.assert_close(logits[row, -len(texts[text]) :], expected[text], rtol=1e-4, atol=1e-5)


def test_generation_with_cache() -> None:
    model = tiny_model()
    with moesaic.record(model) as trace:
        expected = model.generate(ids(), max_new_tokens=6, do_sample=False, pad_token_id=0)
    changed = other_gates(model)
    with moesaic.replay(changed, trace, weights="trace"):
        found = changed.generate(ids(), max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert torch.equal(found, expected)
    with moesaic.replay(changed, trace, weights="trace"), torch.no_grad():  # all at once, without the last tokens
        logits = changed(expected[:, :-1]).logits
    assert torch.equal(logits[:, 8:].argmax(-1), expected[:, 9:])
    with moesaic.fast_decoding(changed), moesaic.replay(changed, trace, weights="trace"):
        assert torch.equal(changed.generate(ids(), max_new_tokens=6, do_sample=False, pad_token_id=0), expected)


def test_dropped_picks_stay_dropped_and_no_others_are() -> None:
    capacity = {"factor": 0.7, "eval_factor": 0.7, "minimum": 1, "renormalize": True}
    model = tiny_model(capacity=capacity)
    trace, output = recorded(model, input_ids=ids(2, 12))
    assert trace.layers[1].dropped
    with moesaic.replay(model, trace), moesaic.record(model) as again:
        torch.testing.assert_close(model(ids(2, 12)).logits, output.logits, **close)
    assert again.layers[1].dropped == trace.layers[1].dropped
    # One text at a time has other slots; what was dropped is the trace's.
    with moesaic.replay(model, trace):
        torch.testing.assert_close(model(ids(2, 12)[:1]).logits, output.logits[:1], **close)
    # A model whose experts have room, and whose kernels never meet a pick of no expert.
    roomy = tiny_model()
    roomy.load_state_dict(model.state_dict())
    with moesaic.replay(roomy, trace, weights="trace"):
        torch.testing.assert_close(roomy(ids(2, 12)).logits, output.logits, **close)
    # And a capacity that the trace knew nothing of.
    free, whole = recorded(roomy, input_ids=ids(2, 12))
    with moesaic.replay(model, free):
        torch.testing.assert_close(model(ids(2, 12)).logits, whole.logits, **close)


def test_a_replay_records_the_trace_again() -> None:
    model = tiny_model()
    trace, _ = recorded(model, input_ids=ids())
    with moesaic.replay(other_gates(model), trace, weights="trace"), moesaic.record(model) as again:
        model(ids())
    for one, other in zip(trace.rows(), again.rows(), strict=True):
        assert torch.equal(one.choice_TK, other.choice_TK)
        assert one.dropped_TK is other.dropped_TK is None


def test_from_a_file_with_the_documents_of_a_micro_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    texts = [ids(2, 9, seed=seed) for seed in range(3)]
    for append, text in enumerate(texts):  # a part for each
        with moesaic.record(model, tmp_path / "texts.trace", append=bool(append)), torch.no_grad():
            model(text)
    read: list[int] = []
    read_row_group = pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        pq.ParquetFile,
        "read_row_group",
        lambda file, group, **given: read.append(1) or read_row_group(file, group, **given),
    )
    changed, trace = other_gates(model), TraceFile(tmp_path / "texts.trace")
    groups = sum(part.metadata.num_row_groups for part in trace.parts)
    with moesaic.replay(changed, trace, weights="trace", documents=[5, 4]):
        assert len(read) == groups // 3
        torch.testing.assert_close(changed(texts[2].flip(0)).logits, model(texts[2].flip(0)).logits, **close)
    with moesaic.replay(changed, trace):
        assert len(read) == groups // 3 + groups
        for text in texts:
            changed(text)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_compiled_model_leaves_its_graph_for_the_picks() -> None:
    model = tiny_model()
    trace, output = recorded(model, input_ids=ids())
    changed = other_gates(model)
    compiled = torch.compile(changed, backend="eager")
    with torch.no_grad():
        own = compiled(ids()).logits
        with moesaic.replay(changed, trace, weights="trace"):
            torch.testing.assert_close(compiled(ids()).logits, output.logits, **close)
        assert torch.equal(compiled(ids()).logits, own)
    torch.compiler.reset()


# --- The block itself -------------------------------------------------------------------------------------------------


def test_after_the_block_or_an_error_in_it_routing_is_the_models_own() -> None:
    model = tiny_model()
    trace, _ = recorded(model, input_ids=ids())
    changed = other_gates(model)
    before = changed(ids()).logits
    with pytest.raises(ValueError, match="mine"), moesaic.replay(changed, trace):
        raise ValueError("mine")
    assert torch.equal(changed(ids()).logits, before)


def test_the_innermost_replay_decides() -> None:
    model = tiny_model()
    trace, output = recorded(model, input_ids=ids())
    changed = other_gates(model)
    other, _ = recorded(changed, input_ids=ids())
    with moesaic.replay(model, other, weights="trace", documents=[0, 1, 0, 1]):
        assert not torch.allclose(model(ids()).logits, output.logits)
        with moesaic.replay(model, trace, weights="trace"):
            torch.testing.assert_close(model(ids()).logits, output.logits, **close)


def test_overrides_apply_one_after_the_other() -> None:
    model = tiny_model()
    seen = []

    def factory(name: str) -> Any:
        def override(layer: int, router: Any, routing: Any, context: Any) -> Any:
            seen.append((name, layer, float(routing.weight_TK.detach().sum())))
            return replace(routing, weight_TK=routing.weight_TK * 2)

        return lambda context, num_tokens: override

    with model.model.override_routing(factory("outer")), model.model.override_routing(factory("inner")):
        model(ids())
    assert [name for name, _, _ in seen] == ["outer", "inner"] * len(LAYERS)
    assert seen[1][2] == pytest.approx(2 * seen[0][2])


# --- Refusals ---------------------------------------------------------------------------------------------------------


def test_another_token_id_is_refused_with_both_ids() -> None:
    model = tiny_model()
    trace, _ = recorded(model, input_ids=ids())
    other = ids()
    other[1, 4] = 2
    message = f"document 1, position 4: the trace has token {int(ids()[1, 4])}, and the model was given 2"
    with pytest.raises(TraceError, match=message), moesaic.replay(model, trace):
        model(other)


def test_tokens_that_the_trace_does_not_hold_are_refused() -> None:
    model = tiny_model()
    trace, _ = recorded(model, input_ids=ids())
    longer = torch.cat([ids(), ids()], dim=1)
    with pytest.raises(TraceError, match=r"document 0, position 9 .*up to 8"), moesaic.replay(model, trace):
        model(longer)
    with moesaic.replay(model, trace):
        model(ids())
        with pytest.raises(TraceError, match=r"document 2, position 0 .*2 documents \(0 to 1\)"):
            model(ids())
    few = pytest.raises(TraceError, match="2 documents have arrived, and `documents` names 1")
    with moesaic.replay(model, trace, documents=[1]), few:
        model(ids())
    sampled = _Log(trace.header.model_copy(update={"sample": 0.5}), [rows[9:] for rows in trace.rows()])
    with pytest.raises(TraceError, match=r"sample = 0\.5"), moesaic.replay(model, sampled):
        model(ids())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({1: LayerFacts(num_experts=NUM_EXPERTS, top_k=2)}, r"layers \[1\], and the model has \[1, 2\]"),
        ({n: LayerFacts(num_experts=8, top_k=2) for n in LAYERS}, "has 8 experts, and the model has 6"),
        ({n: LayerFacts(num_experts=NUM_EXPERTS, top_k=1) for n in LAYERS}, "has 1 picks for each token, and .* has 2"),
        (
            {n: LayerFacts(num_experts=NUM_EXPERTS, top_k=2, num_null=3) for n in LAYERS},
            "has 3 null experts, and the model has 0",
        ),
    ],
)
def test_traces_of_other_shapes_are_refused(change: dict[int, LayerFacts], message: str) -> None:
    model = tiny_model()
    trace, _ = recorded(model, input_ids=ids())
    log = _Log(trace.header.model_copy(update={"layers": change}), [])
    with pytest.raises(TraceError, match=message), moesaic.replay(model, log):
        pass


def test_other_bad_input() -> None:
    model = tiny_model()
    trace, _ = recorded(model, input_ids=ids())
    with pytest.raises(ConfigError, match="choose 'router' or 'trace'"), moesaic.replay(model, trace, weights="mean"):  # type: ignore[arg-type]
        pass
    with pytest.raises(UnsupportedModel, match="no MoE layer"), moesaic.replay(torch.nn.Linear(2, 2), trace):
        pass
    twice = _Log(trace.header, [*trace.rows(), *trace.rows()])
    with pytest.raises(TraceError, match="document 0, position 0 twice"), moesaic.replay(model, twice):
        pass
    deep = tiny_model(depth={"capacity": 0.5})
    with pytest.raises(UnsupportedOverride, match="mixture of depths"), moesaic.replay(deep, trace):
        pass


class _Log:
    def __init__(self, header: Any, rows: list[Rows]) -> None:
        self.header, self._rows = header, rows

    def rows(self, layers: Any = None) -> Any:
        return iter(self._rows)
