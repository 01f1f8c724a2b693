"""Overridden blocks computed natively: the same picks, weights, records and logits as those of the plain modules."""

from __future__ import annotations

import threading
from collections import Counter
from typing import Any

import pytest
import torch
from tests.hf.tiny import token_ids
from tests.infer.decode.models import own, stock
from torch import Tensor, nn

import moesaic
from moesaic.infer.decode import OverrideSpec
from moesaic.infer.decode.overrides import RoutingSwitch
from moesaic.layer import Routing
from moesaic.layer.kernels.native import decode

pytestmark = pytest.mark.skipif(not decode.available(), reason="the native library was not built")

EXPERTS = {"num_experts": 6, "intermediate_size": 24}
NATIVE: list[Any] = ["rank=2", "rank=5,1", "k=4", "k=2", "k=1", "random=2:7", "experts=3,0", "rank=3@2"]
ROUTERS: list[dict[str, Any]] = [
    {"top_k": 2},
    {"top_k": 3, "normalize_top_k": True, "normalization_epsilon": 1e-3, "scaling_factor": 1.7},
    {"top_k": 2, "score_function": "sigmoid", "normalize_top_k": True},
    {"top_k": 2, "softmax_over": "selected"},
]


@pytest.fixture
def native(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How many blocks were computed natively."""
    calls: Counter[str] = Counter()
    plain = decode.MoEHalfPlan.__call__

    def counted(self: Any, *args: Any) -> Any:
        calls["blocks"] += 1
        return plain(self, *args)

    monkeypatch.setattr(decode.MoEHalfPlan, "__call__", counted)
    return calls


def model_of(router: dict[str, Any], dtype: torch.dtype = torch.float32, **spec: Any) -> nn.Module:
    return own(dtype=dtype, router=router, experts=EXPERTS, **spec)


@torch.no_grad()
def step(model: Any, batch: int, **options: Any) -> Any:
    """One step of decoding after a prompt, with its routing."""
    ids, new = token_ids(batch, 5, seed=1), token_ids(batch, 1, seed=2)
    with moesaic.override_routing(model, ()):
        cache = model(ids, use_cache=True).past_key_values
    with moesaic.override_routing(model, **options):
        return model(new, past_key_values=cache, output_routing=True)


def assert_same(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=1e-4)
    assert found.routing.records.keys() == expected.routing.records.keys()
    for layer, plain in expected.routing.records.items():
        assert_same_record(found.routing.records[layer], plain)


def assert_same_record(found: Routing, plain: Routing) -> None:
    assert found.overridden == plain.overridden
    assert torch.equal(found.index_TK, plain.index_TK)
    assert torch.equal(found.choice_TK, plain.choice_TK)
    for name in ("weight_TK", "logits_TN", "scores_TN", "selection_TN"):
        torch.testing.assert_close(getattr(found, name), getattr(plain, name), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("router", ROUTERS, ids=str)
def test_every_row_gets_what_the_plain_modules_give_it(router: dict[str, Any], native: Counter[str]) -> None:
    model = model_of(router)
    rows = [*NATIVE, None]
    for case in ({"rows": rows}, {"rows": [None, "rank=2"] * 4}, {"rows": rows[::-1]}, {"rows": NATIVE[:2]}):
        batch = 16 if len(case["rows"]) == 2 else len(case["rows"])
        expected = step(model, batch, **case)
        native.clear()
        with moesaic.fast_decoding(model):
            assert_same(step(model, batch, **case), expected)
        assert native["blocks"] == 2  # the first layer is dense


@pytest.mark.parametrize("override", NATIVE)
def test_all_rows_alike(override: str, native: Counter[str]) -> None:
    model = model_of(ROUTERS[1], shared_experts={"intermediate_size": 16})
    expected = step(model, 3, override=override)
    with moesaic.fast_decoding(model):
        assert_same(step(model, 3, override=override), expected)
    assert native["blocks"] == 2


@pytest.mark.parametrize("override", ["without=2", "dynamic=0.5", "rank=2+temperature=0.5", "k=3+null=0.4"])
def test_what_only_a_call_can_tell_runs_as_before(override: str, native: Counter[str]) -> None:
    model = model_of(ROUTERS[0])
    for case in ({"override": override}, {"rows": [None, override, "rank=1"]}):
        expected = step(model, 3, **case)
        with moesaic.fast_decoding(model):
            assert_same(step(model, 3, **case), expected)
    assert native["blocks"] == 0


def test_blocks_nested() -> None:
    model = model_of(ROUTERS[1])

    def nested(outer: str, inner: str) -> Any:
        with moesaic.override_routing(model, outer):
            return step(model, 2, override=inner)

    for outer, inner in (("rank=2@1", "rank=3@2"), ("k=4", "temperature=0.5"), ("k=3", "rank=1")):
        expected = nested(outer, inner)
        with moesaic.fast_decoding(model):
            assert_same(nested(outer, inner), expected)


@pytest.mark.parametrize("threads", [1, 2])
def test_equal_experts_rank_by_their_number(threads: int, native: Counter[str]) -> None:
    model: Any = model_of({"top_k": 2, "normalize_top_k": True})
    for block in model.moe_blocks().values():
        block.gate.weight.data[[0, 1, 3, 5]] = 0  # equal to the bit, whoever sums
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        rows = [None, "rank=1", "rank=2", "rank=3", "rank=4,2", "k=5"]
        expected = step(model, 6, rows=rows)
        with moesaic.fast_decoding(model):
            assert_same(step(model, 6, rows=rows), expected)
    finally:
        torch.set_num_threads(before)
    assert native["blocks"] == 2


def test_a_plain_row_is_not_touched_by_its_neighbours(native: Counter[str]) -> None:
    """To the bit, on the native path, of the routing of the first layer with a router; and its tokens."""
    model: Any = model_of(ROUTERS[1])
    with moesaic.fast_decoding(model):
        alone, beside = step(model, 2, rows=[None]), step(model, 2, rows=[None, "k=6"])
    first, second = alone.routing.records[1], beside.routing.records[1]
    assert (first.top_k, second.top_k) == (3, 6)
    for name, nothing in (("index_TK", 6), ("weight_TK", 0)):
        wide = getattr(second, name)[0]
        assert torch.equal(wide[:3], getattr(first, name)[0])
        assert torch.equal(wide[3:], torch.full_like(wide[3:], nothing))
    assert torch.equal(alone.logits[0], beside.logits[0])


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision(dtype: torch.dtype, native: Counter[str]) -> None:
    model = model_of({"top_k": 6, "normalize_top_k": True}, dtype)
    # Experts by number: those of ranks may change where logits are nearly equal.
    rows = [None, "experts=2", "experts=0,4,5"]
    expected = step(model, 3, rows=rows)
    with moesaic.fast_decoding(model):
        found = step(model, 3, rows=rows)
    assert native["blocks"] == 2
    atol = 4 * torch.finfo(dtype).eps * float(expected.logits.abs().max())
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=atol)


@torch.no_grad()
def test_picks_that_there_are_not() -> None:
    model: Any = model_of(ROUTERS[0])
    with moesaic.fast_decoding(model):
        with pytest.raises(moesaic.errors.ConfigError, match="rank"):
            step(model, 2, rows=[None, "rank=7"])
        step(model, 2, rows=[None, "rank=6"])
        layer = model.model.backbone.layers[1]
        plan = layer.__dict__["_native_plan"].second._plan
        x_TD = torch.zeros(2, 1, model.config.get_text_config().hidden_size)
        for ask in ([[1], [7]], [[1], [-7]]):
            with pytest.raises(ValueError, match="outside of the 6 experts"):
                plan(x_TD, None, torch.tensor(ask))
        with pytest.raises(ValueError, match="do not fit 2 rows"):
            plan(x_TD, None, torch.tensor([[1]]))
        nothing, picks = plan(x_TD, None, torch.zeros(2, 2, dtype=torch.int64))
        assert torch.equal(nothing, torch.zeros_like(x_TD))
        assert torch.equal(picks.index_TK, torch.full((2, 2), 6))


@pytest.mark.parametrize("text", ["rank=2", "random=1"])
def test_texts_of_a_generation(text: str) -> None:
    model: Any = model_of(ROUTERS[1])
    ids = token_ids(1, 4).repeat(2, 1)

    def generated() -> Tensor:
        with moesaic.override_routing(model, rows=[None, text]):
            return model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)

    expected = generated()
    with moesaic.fast_decoding(model):
        assert torch.equal(generated(), expected)


STOCK: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 6},
    "mixtral": {"num_local_experts": 6, "num_experts": 6},
    "olmoe": {"num_experts": 6},
}


@pytest.mark.parametrize("name", STOCK)
def test_stock_models(name: str, native: Counter[str]) -> None:
    model = stock(name, **STOCK[name])
    blocks = 0 if name == "olmoe" else 3  # whose decoder layer has norms of another kind

    def logits(**options: Any) -> Tensor:
        return _stock_step(model, 5, **options)

    cases: list[dict[str, Any]] = [{"override": override} for override in NATIVE]
    cases += [
        {"rows": [None, "rank=2", "k=4", "random=1", "experts=5"]},
        {"rows": ["rank=6,2", None, None, "k=1", None]},
    ]
    for case in cases:
        expected = logits(**case)
        with moesaic.fast_decoding(model):
            native.clear()
            torch.testing.assert_close(logits(**case), expected, rtol=0, atol=1e-4)
            assert native["blocks"] == blocks
            assert not torch.allclose(logits(override=()), expected, atol=1e-3) or case in ({"override": "k=2"},)


@torch.no_grad()
def _stock_step(model: Any, batch: int, **options: Any) -> Tensor:
    ids, new = token_ids(batch, 5, seed=1), token_ids(batch, 1, seed=2)
    cache = model(ids, use_cache=True).past_key_values
    with moesaic.override_routing(model, **options):
        return model(new, past_key_values=cache).logits


def test_stock_models_of_which_only_a_call_can_tell(native: Counter[str]) -> None:
    model = stock("qwen3_moe", num_experts=6)

    def nested(*overrides: str) -> Tensor:
        with moesaic.override_routing(model, overrides[0]):
            return _stock_step(model, 3, override=overrides[-1])

    cases = [("without=2",), ("dynamic=0.5+scale=2",), ("k=3", "rank=1"), ("rank=2@0", "rank=3@2")]
    expected = [nested(*case) if len(case) > 1 else _stock_step(model, 3, override=case[0]) for case in cases]
    with moesaic.fast_decoding(model):
        for case, plain in zip(cases, expected, strict=True):
            native.clear()
            found = nested(*case) if len(case) > 1 else _stock_step(model, 3, override=case[0])
            torch.testing.assert_close(found, plain, rtol=0, atol=1e-4)
            assert native["blocks"] == 0


def test_hooks_of_others_are_run_beside_overrides(native: Counter[str]) -> None:
    model: Any = stock("qwen3_moe", num_experts=6)
    seen: list[int] = []
    hook = model.model.layers[1].mlp.gate.register_forward_hook(lambda module, args, output: seen.append(1))
    with moesaic.fast_decoding(model):
        found = _stock_step(model, 2, rows=[None, "rank=2"])
        assert (len(seen), native["blocks"]) == (2, 2)
        hook.remove()
        torch.testing.assert_close(_stock_step(model, 2, rows=[None, "rank=2"]), found, rtol=0, atol=1e-4)
        assert native["blocks"] == 5


def test_threads_of_a_stock_model() -> None:
    """One overrides for itself alone, the other decodes as if it did not."""
    model: Any = stock("mixtral", **STOCK["mixtral"])
    plain = _stock_step(model, 2, override=())
    weak = _stock_step(model, 2, override="rank=2")
    found: dict[str, Tensor] = {}
    switch = RoutingSwitch(model)
    factory = switch.prepare(OverrideSpec.of("rank=2"))
    with moesaic.fast_decoding(model), switch.entered(), switch.acting(factory), torch.no_grad():
        ids, new = token_ids(2, 5, seed=1), token_ids(2, 1, seed=2)

        def other() -> None:
            with torch.no_grad():
                cache = model(ids, use_cache=True).past_key_values
                found["plain"] = model(new, past_key_values=cache).logits

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        with switch.acting(None):
            cache = model(ids, use_cache=True).past_key_values
        found["weak"] = model(new, past_key_values=cache).logits
    torch.testing.assert_close(found["plain"], plain, rtol=0, atol=1e-4)
    torch.testing.assert_close(found["weak"], weak, rtol=0, atol=1e-4)
