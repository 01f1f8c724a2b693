"""Self-contrast against the loop that its paper describes, written down plainly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.infer.decode.decodings.contrast_models import (
    FAMILIES,
    GREEDY,
    decoded,
    model_for,
    padded,
    prompts,
    reference,
    scores,
    sharpened,
)
from tests.infer.decode.overrides.test_models import model_of
from torch import Tensor

import moesaic
from moesaic import SelfContrast

PLANS: tuple[Any, ...] = ("two_rows", "two_passes")


@pytest.mark.parametrize("name", ["ours", *FAMILIES])
def test_a_padded_batch_equals_the_reference_loop(name: str) -> None:
    model, rows = model_for(name), prompts()
    # DeepSeek-V2's weights are plain scores; equation 4 wants 1.
    weak = "rank=2+total=1" if name == "deepseek_v2" else "rank=2"
    expected = reference(model, rows, weak, beta=0.9)
    for plan in PLANS:
        assert decoded(model, rows, SelfContrast(weak=weak, beta=0.9, plan=plan)) == expected, plan
    plain = decoded(model, rows, None)
    assert sum(ours != theirs for ours, theirs in zip(expected, plain, strict=True)) > 6
    if name in ("ours", "mixtral"):
        assert reference(model, rows, weak, beta=0.9, alpha=1e-30) != expected  # so that a wrong mask would be seen


def test_converted_models_decode_like_the_stock_ones() -> None:
    for name in ("mixtral", "deepseek_v3"):
        stock = model_for(name)
        assert decoded(moesaic.convert(stock).eval(), prompts(8), SelfContrast()) == decoded(
            stock, prompts(8), SelfContrast()
        )


@pytest.mark.parametrize("name", ["mixtral", "ours"])
def test_plans_and_recomputation_agree_over_many_tokens(name: str) -> None:
    model, rows = model_for(name), prompts(3)
    options: dict[str, Any] = {
        **GREEDY,
        "max_new_tokens": 64,
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_logits": True,
    }
    found = []
    for plan in PLANS:
        for use_cache in (True, False):
            if (plan, use_cache) != ("two_passes", False):
                decoding = SelfContrast(beta=0.5, plan=plan)
                found.append(model.generate(**padded(rows), custom_generate=decoding, use_cache=use_cache, **options))
    first = found[0]
    assert first.sequences.shape[1] == 12 + 64
    for other in found[1:]:
        assert torch.equal(other.sequences, first.sequences)
        torch.testing.assert_close(torch.stack(other.logits), torch.stack(first.logits), rtol=1e-4, atol=1e-4)
        ours, theirs = torch.stack(other.scores), torch.stack(first.scores)
        finite = ours.isfinite() & theirs.isfinite()
        torch.testing.assert_close(ours[finite], theirs[finite], rtol=1e-4, atol=1e-4)
        assert (ours.isfinite() != theirs.isfinite()).sum() <= 2  # within rounding of the cutoff
    # What `generate` returns of a step are the contrasted scores and the strong logits.
    ids_BS = first.sequences[1:2, 2:-1]
    expected, strong = scores(model, ids_BS, "rank=2", 0.1, 0.5)
    torch.testing.assert_close(first.scores[-1][1:2].double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(first.logits[-1][1:2].double(), strong, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("plan", PLANS)
def test_each_prompt_alone(plan: Any) -> None:
    model, rows = model_for("qwen3_moe"), prompts(6)
    decoding = SelfContrast(plan=plan)
    together = decoded(model, rows, decoding)
    assert together == [decoded(model, [row], decoding)[0] for row in rows]
    assert together[::-1] == decoded(model, rows[::-1], decoding)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", ["ours", "mixtral"])
def test_no_contrast_is_greedy_decoding(plan: Any, name: str) -> None:
    model, rows = model_for(name), prompts(6)
    plain = decoded(model, rows, None)
    for decoding in (
        *(SelfContrast(beta=0, weak=weak, plan=plan) for weak in ("rank=1", "rank=5", "random=1")),
        *(SelfContrast(beta=beta, weak="k=2", plan=plan) for beta in (0.3, 7.0)),  # weak is strong
        SelfContrast(beta=0.9, alpha=1, plan=plan),
    ):
        assert decoded(model, rows, decoding) == plain
    assert decoded(model, rows, SelfContrast(beta=0.9, plan=plan)) != plain


def test_no_contrast_changes_no_bit_of_the_strong_pass() -> None:
    model = model_for("mixtral")
    options: dict[str, Any] = {**GREEDY, "return_dict_in_generate": True, "output_logits": True}
    plain = model.generate(**padded(prompts(3)), **options)
    found = model.generate(**padded(prompts(3)), custom_generate=SelfContrast(beta=0, plan="two_passes"), **options)
    assert torch.equal(torch.stack(found.logits), torch.stack(plain.logits))


@pytest.mark.parametrize("plan", PLANS)
def test_a_stronger_strong_pass_and_other_weak_ones(plan: Any) -> None:
    model, rows = model_for("mixtral"), prompts(2)
    for weak, strong in (
        ("rank=3", "k=4"),
        ("random=1:3", "k=3@1"),
        ("k=1", "dynamic=0.5"),
        ("experts=0,1", "without=2"),
    ):
        expected = reference(model, rows, weak, beta=0.3, strong=strong, new_tokens=4)
        assert decoded(model, rows, SelfContrast(weak=weak, strong=strong, plan=plan), max_new_tokens=4) == expected, (
            weak,
            strong,
        )
    by_temperature = SelfContrast(strong_temperature=2.0, weak_temperature=0.5, beta=0.5, plan=plan)
    ids = padded(rows[:1])["input_ids"]
    found = model.generate(ids, custom_generate=by_temperature, **GREEDY | {"max_new_tokens": 1})
    with torch.no_grad():
        strong_V = model(ids).logits[0, -1] / 2
        with moesaic.override_routing(model, "rank=2"):
            weak_V = model(ids).logits[0, -1] * 2
    masked_V = strong_V < strong_V.max() + torch.tensor(0.1).log()
    assert found[0, -1] == (1.5 * strong_V - 0.5 * weak_V).masked_fill(masked_V, -torch.inf).argmax()


@pytest.mark.parametrize("plan", PLANS)
def test_each_pass_computes_every_position_once(plan: Any) -> None:
    model, rows = model_for("mixtral"), prompts(1)
    counted: list[int] = []
    hook = model.model.layers[0].mlp.gate.register_forward_hook(
        lambda module, args, output: counted.append(args[0].reshape(-1, args[0].shape[-1]).shape[0])
    )
    new = decoded(model, rows, SelfContrast(plan=plan))
    hook.remove()
    assert sum(counted) == 2 * (len(rows[0]) + len(new[0]) - 1)
    assert len(counted) == len(new[0]) * (1 if plan == "two_rows" else 2)


@pytest.mark.parametrize("plan", PLANS)
def test_bfloat16(plan: Any) -> None:
    model = sharpened(model_of("mixtral")).bfloat16()
    options: dict[str, Any] = {**GREEDY, "return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    ids = padded(prompts(1))["input_ids"]
    found = model.generate(ids, custom_generate=SelfContrast(plan=plan), **options)
    scores_BV: Tensor = found.scores[0]
    assert scores_BV.dtype == torch.float32
    with torch.no_grad(), moesaic.override_routing(model, "rank=2"):
        weak_BV = model(ids).logits[:, -1].float()
    kept_BV = scores_BV > -torch.inf
    expected_BV = 1.3 * found.logits[0] - 0.3 * weak_BV  # of bfloat16 logits, but not rounded to it again
    torch.testing.assert_close(scores_BV[kept_BV], expected_BV[kept_BV], rtol=1e-5, atol=1e-5)
