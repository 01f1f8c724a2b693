"""Replays of stock models: their own routers' picks come from the trace, by hooks that leave nothing behind."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tests.parity.stock_models import FAMILIES, stock_model, token_ids
from tests.trace.stock_families import ROUTERS, tiny_model
from torch import nn
from transformers import PreTrainedModel

from moesaic.errors import TraceError, UnsupportedOverride
from moesaic.hf import override_routing
from moesaic.hf.router_presets import ROUTER_PRESETS
from moesaic.hf.stock_routing import stock_routers
from moesaic.layer import routing_at
from moesaic.trace import record, replay

NAMED = ("mixtral", "qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss")
IDS = token_ids()
close: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}


def other_gates(model: PreTrainedModel) -> PreTrainedModel:
    """The same model, whose routers would pick other experts."""
    model = copy.deepcopy(model)
    for router in stock_routers(model).values():
        router.gate.get_parameter("weight").data.neg_()
    return model


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def gradients(model: nn.Module, ids: torch.Tensor = IDS) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(ids, labels=ids, use_cache=False).loss.backward()
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_outputs_and_gradients_are_those_recorded(model_type: str) -> None:
    model = stock_model(model_type)
    with record(model) as trace:
        expected = gradients(model)
    with torch.no_grad():
        logits = model(IDS).logits
        with replay(model, trace):
            torch.testing.assert_close(model(IDS).logits, logits, **close)
        with replay(model, trace, weights="trace"):
            torch.testing.assert_close(model(IDS).logits, logits, **close)
    with replay(model, trace):
        torch.testing.assert_close(gradients(model), expected, **close)
    assert not hooks(model)


@pytest.mark.parametrize("model_type", NAMED)
def test_the_trace_decides_whatever_the_gate_says(model_type: str) -> None:
    model = stock_model(model_type)
    with torch.no_grad(), record(model) as trace:
        expected = model(IDS).logits
        generated = model.generate(
            IDS,  # pyright: ignore[reportCallIssue]
            max_new_tokens=5,
            do_sample=False,
            eos_token_id=None,
        )
    changed = other_gates(model)
    with torch.no_grad():
        assert not torch.allclose(changed(IDS).logits, expected, atol=1e-3)
        with replay(changed, trace, weights="trace"), record(changed) as again:
            torch.testing.assert_close(changed(IDS).logits, expected, **close)
            found = changed.generate(
                IDS,  # pyright: ignore[reportCallIssue]
                max_new_tokens=5,
                do_sample=False,
                eos_token_id=None,
            )
    assert torch.equal(found, generated)
    for one, other in zip(trace.rows(), again.rows(), strict=True):
        assert torch.equal(one.choice_TK.sort(-1).values, other.choice_TK.sort(-1).values)
    assert not hooks(changed)


@pytest.mark.parametrize("model_type", NAMED)
def test_weights_of_the_router_are_the_familys_own_at_the_picks_of_the_trace(model_type: str) -> None:
    model = stock_model(model_type)
    with torch.no_grad(), record(model) as trace:
        model(IDS)
    changed = other_gates(model)
    with replay(changed, trace):
        gradients(changed)
    for router in stock_routers(changed).values():
        grad = router.gate.get_parameter("weight").grad
        assert grad is not None
        assert grad.norm() > 0


@pytest.mark.parametrize("reentrant", [False, True], ids=["non_reentrant", "reentrant"])
@pytest.mark.parametrize("model_type", ["mixtral", "deepseek_v3"])
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
def test_layers_recomputed_after_the_block_have_the_picks_of_their_forward_pass(
    model_type: str, reentrant: bool
) -> None:
    model = stock_model(model_type)
    with torch.no_grad(), record(model) as trace:
        model(IDS)
        model(IDS[:1])
    changed = other_gates(model).train()
    with replay(changed, trace):
        expected = gradients(changed)
        first = gradients(changed, IDS[:1])
    changed.gradient_checkpointing_enable({"use_reentrant": reentrant})
    changed.enable_input_require_grads()
    before = hooks(changed)
    with replay(changed, trace):
        losses = [changed(ids, labels=ids, use_cache=False).loss for ids in (IDS, IDS[:1])]
    for loss, wanted in zip(losses, (expected, first), strict=True):
        changed.zero_grad()
        loss.backward()
        found = {name: value.grad for name, value in changed.named_parameters() if value.grad is not None}
        torch.testing.assert_close(found, wanted, **close)
    losses.clear()
    del loss  # pyright: ignore[reportPossiblyUnboundVariable]
    assert hooks(changed) == before


def test_padding_and_another_order() -> None:
    model = stock_model("qwen3_moe")
    texts = [IDS[0, :5], IDS[1]]
    with torch.no_grad(), record(model) as trace:
        expected = [model(text.unsqueeze(0)).logits[0] for text in texts]
    batch, mask = torch.zeros(2, IDS.shape[1], dtype=torch.int64), torch.zeros(2, IDS.shape[1], dtype=torch.int64)
    for row, text in enumerate((texts[1], texts[0])):
        batch[row, -len(text) :], mask[row, -len(text) :] = text, 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    changed = other_gates(model)
    with torch.no_grad(), replay(changed, trace, weights="trace", documents=[1, 0]):
        logits = changed(batch, attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(logits[0], expected[1], **close)
    torch.testing.assert_close(logits[1, -5:], expected[0], **close)


def test_overrides_of_stock_models_are_nested_like_those_of_ours() -> None:
    model, seen = stock_model("mixtral"), []

    def factory(name: str, k: int) -> Any:
        def override(layer: int, router: Any, routing: Any, context: Any) -> Any:
            seen.append((name, layer, routing.top_k))
            return routing_at(router, routing, routing.selection_TN.topk(k, dim=-1).indices)

        return lambda context, num_tokens: override

    with torch.no_grad():
        plain = model(IDS).logits
        with override_routing(model, factory("outer", 3)), override_routing(model, factory("inner", 1)):
            one = model(IDS).logits
    assert seen == [("outer", 0, 2), ("inner", 0, 3), ("outer", 1, 2), ("inner", 1, 3)]
    assert not torch.allclose(one, plain, atol=1e-3)


def test_refusals() -> None:
    model = stock_model("olmoe")
    with torch.no_grad(), record(model) as trace:
        model(IDS)
    with (
        torch.no_grad(),
        replay(model, trace),
        pytest.raises(TraceError, match="document 0, position 2: the trace has"),
    ):
        model(IDS.index_fill(1, torch.tensor([2]), 1).index_fill(1, torch.tensor([3]), 63))
    assert not hooks(model)
    with pytest.raises(TraceError, match="has 3 picks"), replay(stock_model("mixtral"), trace):
        pass


@pytest.mark.parametrize("name", ROUTERS)
def test_further_families(name: str) -> None:
    model = tiny_model(ROUTER_PRESETS[name])
    with torch.no_grad(), record(model) as trace:
        expected = model(IDS).logits
    if ROUTER_PRESETS[name].call is not None:
        with pytest.raises(UnsupportedOverride, match="does not return logits, weights"), replay(model, trace):
            pass
        return
    for weights in ("router", "trace"):
        with torch.no_grad(), replay(model, trace, weights=weights):  # type: ignore[arg-type]
            torch.testing.assert_close(model(IDS).logits, expected, **close)
    assert not hooks(model)
