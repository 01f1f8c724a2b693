"""Null experts for a trained model: the same outputs and load at first, or a refusal; then an ordinary model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.hf.tiny import tiny_model, token_ids

import moesaic
from moesaic import MoesaicForCausalLM
from moesaic.errors import ConfigError, UnsupportedExport
from moesaic.layer import loads_of
from moesaic.trace import account

N = 4


def source(dtype: torch.dtype = torch.float32, **sections: Any) -> MoesaicForCausalLM:
    router = {"top_k": 2, "normalize_top_k": True} | sections.pop("router", {})
    return tiny_model("llama", router=router, **sections).to(dtype)


@torch.no_grad()
def experts_per_token(model: MoesaicForCausalLM) -> list[float]:
    context = model(token_ids(4, 20), output_routing=True).routing
    return [load.experts_per_token.item() for load in loads_of(context).values()]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("copies", range(1, 7))
@torch.no_grad()
def test_outputs_are_kept_and_the_load_is_exactly_that_of_before(copies: int, dtype: torch.dtype) -> None:
    before, ids = source(dtype), token_ids(4, 20)
    model = moesaic.add_null_experts(before, copies * N)
    assert model.config.spec.router.top_k == copies + 2  # type: ignore[union-attr]
    torch.testing.assert_close(model(ids).logits, before(ids).logits, rtol=1e-6, atol=1e-5)
    assert experts_per_token(model) == [2.0, 2.0]


@pytest.mark.parametrize(
    "router",
    [
        {"top_k": 1, "normalize_top_k": False},
        {"top_k": 3, "normalize_top_k": False, "scaling_factor": 2.5},
        {"top_k": 3, "normalize_top_k": False, "softmax_over": "selected", "linear_bias": True},
        {"top_k": 4, "stable_ties": False},
    ],
    ids=str,
)
@torch.no_grad()
def test_outputs_of_other_top_k_routers_are_kept(router: dict[str, Any]) -> None:
    before, ids = source(router=router, shared_experts={"num_experts": 1}), token_ids(4, 20)
    model = moesaic.add_null_experts(before, 2 * N)
    torch.testing.assert_close(model(ids).logits, before(ids).logits, rtol=1e-5, atol=1e-5)
    assert experts_per_token(model) == [router["top_k"]] * 2


def test_one_pick_more_for_each_copy_is_one_expert_less() -> None:
    """K = c + 1 leaves one expert of two."""
    model = moesaic.add_null_experts(source(), 3 * N, top_k=4, exact=False)
    assert experts_per_token(model) == [1.0, 1.0]


def test_nothing_is_shared_with_the_source() -> None:
    before, ids = source(), token_ids()
    expected = before(ids).logits.detach()
    model = moesaic.add_null_experts(before, N)
    held = {parameter.data_ptr() for parameter in before.parameters()}
    assert not held & {parameter.data_ptr() for parameter in model.parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(before(ids).logits, expected)
    assert before.config.spec.router.type == "top_k"


def test_the_result_is_an_ordinary_model(tmp_path: Any) -> None:
    before, ids = source(), token_ids()
    model = moesaic.add_null_experts(before.train(), 2 * N)
    assert model.training
    assert model.config.spec.balance == before.config.spec.balance
    model.save_pretrained(tmp_path)
    loaded = MoesaicForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)
    generated = model.generate(ids, max_new_tokens=5, do_sample=False)
    assert torch.equal(generated, before.eval().generate(ids, max_new_tokens=5, do_sample=False))


def test_training_on_moves_the_load_below_that_of_before() -> None:
    model = moesaic.add_null_experts(source(), 2 * N).train()
    optimizer = torch.optim.Adam([block.gate.weight for block in model.moe_blocks().values()], lr=1e-2)
    ids = token_ids(8, 20)
    for _ in range(30):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    assert all(load < 1.9 for load in experts_per_token(model.eval()))


def test_cost_counts_the_experts_that_run_and_the_wider_gate() -> None:
    """With m = N and K = 3, 1.5 of 4 experts run when balanced; nulls add D m to each gate, and nothing else."""
    before, after = account(source()), account(moesaic.add_null_experts(source(), N))
    experts, layers = before.parts["routed experts"].total, 2
    gate = layers * 32 * N
    assert after.total - before.total == after.parts["router"].total - before.parts["router"].total == gate
    assert after.parts["routed experts"].active == experts * 1.5 / N
    lost = experts * (2 - 1.5) / N
    assert before.flops_per_token() - after.flops_per_token() == 2 * (lost - gate)


def test_no_stock_family_has_null_experts() -> None:
    with pytest.raises(UnsupportedExport, match=r"moe\.router\.type = 'null_experts'"):
        moesaic.export(moesaic.add_null_experts(source(), N))


@pytest.mark.parametrize(
    ("sections", "arguments", "message"),
    [
        ({}, {"num_null": 6}, r"num_null = 6 is not a multiple of num_experts \(4\); choose 8"),
        ({}, {"num_null": 0}, r"num_null = 0 is not a multiple .*choose 4"),
        ({}, {"num_null": 8, "top_k": 3}, r"top_k = 3 changes which experts run; leave it out, for 4"),
        ({"router": {"score_function": "sigmoid"}}, {"num_null": 4}, r"moe\.router\.score_function = 'sigmoid' is not"),
        ({"router": {"selection_bias": True}}, {"num_null": 4}, r"moe\.router\.selection_bias = True"),
        ({"router": {"num_groups": 2, "top_k_groups": 1}}, {"num_null": 4}, r"moe\.router\.num_groups = 2"),
        ({"router": {"normalization_epsilon": 0.1}}, {"num_null": 4}, r"normalization_epsilon = 0\.1 .*exact=False"),
        ({"capacity": {"factor": 1.0}}, {"num_null": 4}, r"moe\.capacity = .*exact=False"),
        ({"layers": {"only": [0, 2], "top_k": [1, 2]}}, {"num_null": 4}, r"moe\.layers = .*differ"),
        ({"router": {"type": "null_experts", "num_null": 4}}, {"num_null": 4}, r"moe\.router\.type = 'null_experts'"),
    ],
)
def test_what_can_not_be_kept_is_refused_by_name(
    sections: dict[str, Any], arguments: dict[str, Any], message: str
) -> None:
    if sections.get("router", {}).get("type"):
        model = tiny_model("llama", router={"top_k": 2, **sections["router"]})
    else:
        model = source(**sections)
    with pytest.raises(ConfigError, match=message):
        moesaic.add_null_experts(model, **arguments)


@torch.no_grad()
def test_capacity_and_another_k_are_possible_when_asked_for() -> None:
    model = source(capacity={"factor": 1.0}, router={"normalization_epsilon": 0.1})
    changed = moesaic.add_null_experts(model, N, top_k=2, exact=False)
    assert changed.config.spec.capacity == model.config.spec.capacity
    assert changed(token_ids()).logits.isfinite().all()
