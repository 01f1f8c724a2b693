"""Rows of a batch with settings of their own, overrides around, threads, and whatever else holds the model."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.hf.router_models import extras, inputs, router_model
from tests.infer.decode.decodings.contrast_models import GREEDY, decoded, model_for, padded, prompts, reference
from tests.infer.decode.overrides.test_models import model_of
from tests.infer.decode.overrides.test_routers import NO_PICKS, why_not
from tests.infer.decode.overrides.test_state import in_threads
from tests.layer.router_rows import ROUTERS

import moesaic
from moesaic import SelfContrast
from moesaic.errors import ConfigError, UnsupportedDecoding, UnsupportedOverride
from moesaic.hf.generation_view import view
from moesaic.infer.decode import SelfContrastRows

PLANS: tuple[Any, ...] = ("two_rows", "two_passes")
BOTH = pytest.mark.parametrize("plan", PLANS)


def settings(plan: Any) -> list[SelfContrast | None]:
    return [
        SelfContrast(beta=0.9, weak="rank=3", plan=plan),
        None,
        SelfContrast(alpha=0.5, strong="k=3", plan=plan),
        None,
        SelfContrast(beta=0.9, weak="rank=3", plan=plan),
    ]


@BOTH
@pytest.mark.parametrize("name", ["ours", "mixtral"])
def test_rows_with_settings_of_their_own(plan: Any, name: str) -> None:
    model, rows, mixed = model_for(name), prompts(5), settings(plan)
    together = decoded(model, rows, SelfContrastRows(rows=mixed))
    for row, prompt, expected in zip(mixed, rows, together, strict=True):
        assert decoded(model, [prompt], row)[0] == expected
    turned = decoded(model, rows[::-1], SelfContrastRows(rows=mixed[::-1]))
    assert turned == together[::-1]
    by_beams = decoded(model, rows, SelfContrastRows(rows=mixed), num_beams=2, num_return_sequences=2)
    for row in (0, 1, 2):
        alone = decoded(model, [rows[row]], mixed[row] and SelfContrastRows(rows=[mixed[row]]), num_beams=2)[0]
        assert by_beams[2 * row] == alone
    plain = decoded(model, rows, None)
    assert decoded(model, rows, SelfContrastRows(rows=[None])) == plain
    with pytest.raises(ConfigError, match="entries do not fit a batch of 5 rows"):
        decoded(model, rows, SelfContrastRows(rows=mixed[:2]))
    other = SelfContrast(plan=next(one for one in PLANS if one != plan))
    with pytest.raises(ConfigError, match="have different plans"):
        SelfContrastRows.from_dict({"rows": [*mixed, other]}, where="decoding")


@pytest.mark.parametrize(("name", "plan"), [("ours", "two_rows"), ("mixtral", "two_passes")])
def test_an_override_around(plan: Any, name: str) -> None:
    model, rows, decoding = model_for(name), prompts(4), SelfContrast(plan=plan)
    with moesaic.override_routing(model, "without=2"):
        together = decoded(model, rows, decoding)
        assert together == [reference(model, [row], beta=0.3)[0] for row in rows]
        (in_thread,) = in_threads(lambda: decoded(model, rows, decoding))
        assert in_thread == together  # as a streamer has it
    around: list[Any] = ["without=2", None, "temperature=3", "without=1"]
    mixed = [decoding, decoding, None, None]
    for settings in ([decoding] * 4, mixed):
        with moesaic.override_routing(model, rows=around):
            found = decoded(model, rows, SelfContrastRows(rows=settings))
        for row, prompt, override, tokens in zip(settings, rows, around, found, strict=True):
            with moesaic.override_routing(model, override or ()):
                assert decoded(model, [prompt], row)[0] == tokens
    with moesaic.override_routing(model, rows=["without=2", "temperature=3"]):  # one for each two prompts
        found = decoded(model, rows, SelfContrastRows(rows=mixed))
    with moesaic.override_routing(model, "without=2"):
        assert decoded(model, rows[1:2], decoding)[0] == found[1]


@pytest.mark.parametrize("name", ["ours", "mixtral"])
def test_threads_do_not_interfere(name: str) -> None:
    model, rows = model_for(name), prompts(2)
    works = [SelfContrast(weak="rank=2"), SelfContrast(weak="rank=3", beta=0.9, plan="two_passes"), None]
    expected = [decoded(model, rows, work, max_new_tokens=16) for work in works]
    ready = threading.Barrier(len(works))

    def work(decoding: Any) -> list[list[list[int]]]:
        ready.wait()
        return [decoded(model, rows, decoding, max_new_tokens=16) for _ in range(2)]

    found = in_threads(*(lambda decoding=decoding: work(decoding) for decoding in works))
    assert found == [[one, one] for one in expected]
    assert decoded(model, rows, None, max_new_tokens=16) == expected[2]


@BOTH
@pytest.mark.parametrize("name", ["ours", "qwen3_moe"])
def test_fast_decoding_and_recordings_around(plan: Any, name: str) -> None:
    model, rows, decoding = model_for(name), prompts(2), SelfContrast(plan=plan)
    expected = decoded(model, rows, decoding)
    with moesaic.fast_decoding(model):
        assert decoded(model, rows, decoding) == expected
    with moesaic.record(model) as trace:
        assert decoded(model, rows[:1], decoding) == expected[:1]
    routing = next(iter(trace.layers.values()))
    assert len(routing.index_TK) == 2 * (len(rows[0]) + len(expected[0]) - 1)  # both passes


@BOTH
def test_adapters(plan: Any) -> None:
    torch.manual_seed(0)
    lora = LoraConfig(target_modules=["q_proj", "v_proj"], r=4, init_lora_weights=False)
    adapted: Any = get_peft_model(model_of("mixtral"), lora).eval()
    rows = prompts(3)
    assert decoded(adapted, rows, SelfContrast(plan=plan)) == reference(adapted, rows, beta=0.3)
    streamed = SelfContrast(plan=plan).generate(adapted, **padded(rows), **GREEDY)
    assert streamed[:, 12:].tolist() == reference(adapted, rows, beta=0.3)


def test_a_view_of_a_class_that_makes_others() -> None:
    model = model_of("mixtral")
    before = type(model)

    class Sharded(before):  # type: ignore[misc, valid-type]
        def __new__(cls, *args: Any, **kwargs: Any) -> Any:
            return before.__new__(before)

    model.__class__ = Sharded
    seen = view(model, lambda inputs: "mine")  # type: ignore[arg-type]
    assert seen(input_ids=None) == "mine"
    assert isinstance(seen, Sharded)
    assert seen.lm_head is model.lm_head


@pytest.mark.parametrize("name", ROUTERS)
@torch.no_grad()
def test_every_router_contrasts_with_a_cache_as_without_or_refuses(name: str) -> None:
    model = router_model(name).eval()
    given: dict[str, Any] = inputs(2, 6)
    given |= extras(model, given["input_ids"]) | GREEDY | {"max_new_tokens": 3}
    if model.config.spec.unservable is not None:
        with pytest.raises(UnsupportedDecoding):
            model.generate(**given, custom_generate=SelfContrast())
        return
    if len(given) > len(GREEDY) + 1:  # tests of models decode plainly those that need no more than ids
        assert torch.equal(*(model.generate(**given, use_cache=cache) for cache in (True, False)))
    refusal = why_not(name, "rank=2")
    if refusal is not None:
        with pytest.raises(UnsupportedOverride, match=refusal):
            model.generate(**given, custom_generate=SelfContrast())
        if name in NO_PICKS:
            return
    weak = "temperature=3" if refusal is not None else "rank=2"
    found = [
        model.generate(**given, custom_generate=SelfContrast(weak=weak, beta=0.9, plan=plan), use_cache=cache)
        for plan, cache in (("two_rows", True), ("two_passes", False))
    ]
    assert torch.equal(found[0], found[1])
