"""What `generate` can do, with self-contrast: beams, samples, outputs, processors, stop criteria, streamers, caches."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from tests.hf.tiny import dense_model
from tests.infer.consistency.text_models import character_tokenizer
from tests.infer.decode.decodings.contrast_models import (
    GREEDY,
    decoded,
    model_for,
    padded,
    prompts,
    reference,
    scores,
)
from tests.trace.models import tiny_model
from transformers import (
    DynamicCache,
    LogitsProcessorList,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)
from transformers.generation.streamers import BaseStreamer

from moesaic import SelfContrast
from moesaic.errors import ConfigError, UnsupportedModel, UnsupportedOverride
from moesaic.infer.consistency import Generate, RowSampler, Sampler, last_number, self_consistency

PLANS: tuple[Any, ...] = ("two_rows", "two_passes")
BOTH = pytest.mark.parametrize("plan", PLANS)


def beams(model: Any, prompt: Any, width: int, new_tokens: int, beta: float, alpha: float) -> tuple[list[int], float]:
    """The best of plain beam search without an end of sequence: sums of log softmax of the contrasted scores."""
    kept: list[tuple[float, list[int]]] = [(0.0, prompt.tolist())]
    for _ in range(new_tokens):
        ids_BS = torch.tensor([ids for _, ids in kept])
        log_p_BV = scores(model, ids_BS, "rank=2", alpha, beta)[0].log_softmax(-1)
        best = (log_p_BV + torch.tensor([[score] for score, _ in kept])).flatten().topk(width)
        size = log_p_BV.shape[1]
        kept = [
            (score, [*kept[place // size][1], place % size])
            for score, place in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]
    score, ids = kept[0]
    return ids[len(prompt) :], score / new_tokens


@BOTH
@pytest.mark.parametrize("use_cache", [True, False])
def test_beam_search(plan: Any, use_cache: bool) -> None:
    model, rows = model_for("mixtral"), prompts(3)
    options: dict[str, Any] = {"num_beams": 3, "max_new_tokens": 6, "use_cache": use_cache}
    found = model.generate(
        **padded(rows),
        custom_generate=SelfContrast(beta=0.5, plan=plan),
        **GREEDY | options,
        return_dict_in_generate=True,
        output_scores=True,
    )
    for row, prompt in enumerate(rows):
        tokens, score = beams(model, prompt, 3, 6, 0.5, 0.1)
        assert found.sequences[row, 12:].tolist() == tokens
        assert found.sequences_scores[row].item() == pytest.approx(score, abs=1e-4)
    everything = SelfContrast(beta=0, alpha=1e-30, plan=plan)
    assert decoded(model, rows, everything, **options) == decoded(model, rows, None, **options)


@BOTH
def test_sequences_of_a_prompt_and_sampling_beams(plan: Any) -> None:
    model, rows = model_for("mixtral"), prompts(2)
    several = decoded(model, rows, SelfContrast(plan=plan), num_beams=4, num_return_sequences=3)
    assert len(several) == 6
    assert len({tuple(tokens) for tokens in several[:3]}) == 3
    for row, prompt in enumerate(rows):
        alone = decoded(model, [prompt], SelfContrast(plan=plan), num_beams=4, num_return_sequences=3)
        assert several[3 * row : 3 * row + 3] == alone

    def sampled(decoding: Any, **options: Any) -> list[list[int]]:
        torch.manual_seed(3)
        return decoded(model, rows, decoding, do_sample=True, top_k=0, **options)

    for options in ({"num_beams": 2}, {"num_return_sequences": 3}):
        assert sampled(SelfContrast(plan=plan), **options) == sampled(SelfContrast(plan=plan), **options)
        assert sampled(SelfContrast(plan=plan), **options) == sampled(SelfContrast(plan="two_passes"), **options)
        # Without contrast, and with all tokens plausible, sampling is plain sampling, draw for draw.
        assert sampled(SelfContrast(beta=0, alpha=1e-30, plan=plan), **options) == sampled(None, **options)


@BOTH
def test_sampling_without_contrast_is_sampling_of_plausible_tokens(plan: Any) -> None:
    model, rows = model_for("ours"), prompts(4)

    def sampled(decoding: Any, **options: Any) -> list[list[int]]:
        torch.manual_seed(5)
        return decoded(model, rows, decoding, do_sample=True, top_k=0, **options)

    # min-p keeps what the mask keeps.
    assert sampled(SelfContrast(beta=0, alpha=0.1, plan=plan)) == sampled(None, min_p=0.1)
    assert sampled(SelfContrast(beta=0, alpha=0.1, plan=plan)) != sampled(None)
    cold = sampled(SelfContrast(plan=plan), temperature=1e-4)
    assert cold == decoded(model, rows, SelfContrast(plan=plan))


@BOTH
def test_processors(plan: Any) -> None:
    model, rows = model_for("mixtral"), prompts(3)
    decoding = SelfContrast(plan=plan)
    plain = decoded(model, rows, decoding)
    options: dict[str, Any] = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    found = model.generate(
        **padded(rows),
        custom_generate=decoding,
        **GREEDY | options,
        suppress_tokens=[plain[0][0]],
        repetition_penalty=1.5,
    )
    (strong_BV, _), ids = (found.logits[0], None), padded(rows)["input_ids"]
    penalised_BV = strong_BV.clone()
    seen_BV = torch.zeros_like(strong_BV, dtype=torch.bool).scatter_(1, ids, True)
    penalised_BV = torch.where(seen_BV & (strong_BV < 0), strong_BV * 1.5, penalised_BV)
    penalised_BV = torch.where(seen_BV & (strong_BV > 0), strong_BV / 1.5, penalised_BV)
    penalised_BV[:, plain[0][0]] = -torch.inf
    kept_BV = penalised_BV >= penalised_BV.amax(-1, keepdim=True) + torch.tensor(0.1).log()
    assert torch.equal(found.scores[0] > -torch.inf, kept_BV)
    assert plain[0][0] not in found.sequences[:, 12:]
    # An end of sequence that may not come yet is not the likeliest token either.
    end = plain[1][2]
    ended = decoded(model, rows, decoding, eos_token_id=end)
    assert ended[1][:3] == plain[1][:3]
    assert set(ended[1][3:]) <= {0}
    later = decoded(model, rows, decoding, eos_token_id=end, min_new_tokens=6)
    assert end not in later[1][:6]
    assert end not in decoded(model, rows, SelfContrast(plan=plan, eos_ban="before_mask"), eos_token_id=end)[1]
    rare = next(token for token in range(3, 50) if all(token not in row for row in plain))
    assert decoded(model, rows, SelfContrast(plan=plan, eos_ban="official"), eos_token_id=rare) == plain


def test_the_published_ban_of_the_end_is_an_error_where_nothing_is_left() -> None:
    model, rows = model_for("mixtral"), prompts(1)
    strong = model.generate(**padded(rows), **GREEDY | {"max_new_tokens": 1})[0, -1].item()
    narrow: dict[str, Any] = {"alpha": 0.999, "beta": 0.5}
    with pytest.raises(ConfigError, match="leaves no token"):
        decoded(model, rows, SelfContrast(eos_ban="official", **narrow), eos_token_id=strong)
    safe = decoded(model, rows, SelfContrast(eos_ban="before_mask", **narrow), eos_token_id=strong)
    assert strong not in safe[0]

    class After(StoppingCriteria):
        def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
            return torch.tensor([True, False])[: input_ids.shape[0]]

    # A row that has ended decodes on until the others have, and may then meet the trap.
    both = [rows[0], prompts(2)[1]]
    stopped = decoded(
        model,
        both,
        SelfContrast(eos_ban="official"),
        eos_token_id=63,
        stopping_criteria=StoppingCriteriaList([After()]),
    )
    assert set(stopped[0][1:]) == {0}


@BOTH
def test_streamers_and_stop_strings(plan: Any) -> None:
    model, tokenizer = model_for("mixtral"), character_tokenizer()
    decoding = SelfContrast(plan=plan)
    batch = padded(prompts(1))
    ids = decoded(model, prompts(1), decoding, max_new_tokens=16)[0]
    streamer: Any = TextIteratorStreamer(tokenizer, skip_prompt=True)
    options = GREEDY | {"max_new_tokens": 16}
    thread = threading.Thread(
        target=lambda: decoding.generate(model, **batch, streamer=streamer, **options), daemon=True
    )
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text == tokenizer.decode(ids)
    stop = tokenizer.decode(ids[4:6])
    stopped = decoding.generate(model, **batch, stop_strings=[stop], tokenizer=tokenizer, **options)
    kept = stopped[0, 12:].tolist()
    assert kept == ids[: len(kept)]
    assert len(kept) < 16
    assert stop in tokenizer.decode(kept)
    with pytest.raises(ConfigError, match="tokenizer = None is missing"):
        decoding.generate(model, **batch, stop_strings=[stop], **options)


@BOTH
@pytest.mark.parametrize("name", ["ours", "mixtral", "gpt_oss"])
def test_caches(plan: Any, name: str) -> None:
    model, rows = model_for(name), prompts(3)
    decoding = SelfContrast(plan=plan)
    expected = decoded(model, rows, decoding)
    assert decoded(model, rows, decoding, cache_implementation="static") == expected
    assert decoded(model, rows, decoding, prefill_chunk_size=5) == expected
    assert decoded(model, rows, decoding, past_key_values=DynamicCache(config=model.config)) == expected
    beams = decoded(model, rows, decoding, num_beams=2)
    assert decoded(model, rows, decoding, num_beams=2, cache_implementation="static") == beams
    returned = model.generate(**padded(rows), custom_generate=decoding, return_dict_in_generate=True, **GREEDY)
    own = model.generate(**padded(rows), return_dict_in_generate=True, **GREEDY | {"max_new_tokens": 1})
    # The cache that is given back is that of the strong pass.
    for ours, theirs in zip(returned.past_key_values.layers, own.past_key_values.layers, strict=True):
        assert ours.keys.shape[0] == len(rows)
        if not getattr(ours, "is_sliding", False):
            torch.testing.assert_close(ours.keys[:, :, :12], theirs.keys[:, :, :12], rtol=1e-4, atol=1e-5)
    with pytest.raises(ConfigError, match=r"past_key_values = '[0-9]+ tokens'"):
        decoded(model, rows, decoding, past_key_values=own.past_key_values)


def test_memory_for_another_batch_is_refused() -> None:
    model = model_for("mixtral")
    cache = StaticCache(config=model.config, max_cache_len=32)
    cache.early_initialization(batch_size=1, num_heads=2, head_dim=8, dtype=model.dtype, device=model.device)
    with pytest.raises(ConfigError, match="memory for 1 rows"):
        decoded(model, prompts(1), SelfContrast(), past_key_values=cache)
    expected = decoded(model, prompts(1), SelfContrast())
    assert decoded(model, prompts(1), SelfContrast(plan="two_passes"), past_key_values=cache) == expected


@BOTH
@pytest.mark.parametrize("name", ["ours", "qwen3_moe"])
def test_other_inputs(plan: Any, name: str) -> None:
    model, rows = model_for(name), prompts(2)
    decoding = SelfContrast(plan=plan)
    same = [rows[0], rows[0].flip(0)]
    expected = decoded(model, same, decoding)
    ids = torch.stack(same)
    given: dict[str, Any] = {"custom_generate": decoding, **GREEDY}
    assert model.generate(ids, **given)[:, 12:].tolist() == expected
    embedded = model.generate(inputs_embeds=model.get_input_embeddings()(ids), **given)
    assert embedded.tolist() == expected
    positions = torch.arange(12).expand(2, -1)
    assert model.generate(ids, position_ids=positions, **given)[:, 12:].tolist() == expected
    with torch.inference_mode():
        assert model.generate(ids, **given)[:, 12:].tolist() == expected
    wide = model.generate(ids, output_hidden_states=True, return_dict_in_generate=True, **given)
    assert wide.hidden_states[0][-1].shape[:2] == (2, 12)
    assert wide.hidden_states[3][0].shape[:2] == (2, 1)


def test_samples_by_seed_in_any_company() -> None:
    model, tokenizer = model_for("mixtral"), character_tokenizer()
    decoding = SelfContrast(beta=0.5, weak="rank=3")
    prompts_ = ["12+7=", "a b c", "3*4"]
    wanted = [(prompt, number) for prompt in prompts_ for number in range(4)]

    def drawn(batch_size: int, wanted: Any, **options: Any) -> list[tuple[int, ...]]:
        generate = Generate(custom_generate=decoding, do_sample=True, **options)
        sampler = Sampler(model, tokenizer, generate, max_new_tokens=6, batch_size=batch_size, seed=2)
        return [sample.ids for sample in sampler.draw(wanted)]

    together = drawn(12, wanted)
    assert len(set(together)) > 6
    assert together == drawn(1, wanted)
    assert together[::-1] == drawn(5, wanted[::-1])
    cold = drawn(12, wanted, temperature=1e-4)
    greedy = Sampler(model, tokenizer, Generate(custom_generate=decoding), max_new_tokens=6)
    assert cold == [sample.ids for sample in greedy.draw(wanted)]
    assert greedy.usage.generated_tokens == sum(len(ids) for ids in cold)
    assert greedy.usage.weak_tokens == greedy.usage.prompt_tokens + sum(len(ids) - 1 for ids in cold)
    assert greedy.decoding.repeats  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="all equal"):
        self_consistency(greedy, ["1+1="], last_number(), samples=3)
    assert not Generate(custom_generate=decoding, do_sample=True).repeats


# --- Refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"beta": -0.1}, "beta"),
        ({"alpha": 0}, "alpha"),
        ({"alpha": 1.1}, "alpha"),
        ({"weak_temperature": 0}, "weak_temperature"),
        ({"plan": "three"}, "plan"),
        ({"weak": "rang=2"}, "has a part that is none"),
        ({"gamma": 1}, "gamma"),
    ],
)
def test_bad_settings_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SelfContrast.from_dict(fields, where="decoding")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_lookup_num_tokens": 3}, "generation mode = 'assisted_generation' can't be combined"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "generation mode = 'contrastive_search'"),
        ({"dola_layers": "low"}, "generation mode = 'dola_generation'"),
        ({"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0}, "generation mode = 'group_beam_search'"),
    ],
)
def test_modes_with_loops_of_their_own_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        decoded(model_for("mixtral"), prompts(1), SelfContrast(), **options)


@BOTH
def test_models_and_routings_that_do_not_fit(plan: Any) -> None:
    model = model_for("mixtral")
    with pytest.raises(ConfigError, match="rank = 9 is more than the 8 experts"):
        decoded(model, prompts(1), SelfContrast(weak="rank=9", plan=plan))
    with pytest.raises(ConfigError, match="layer without a router"):
        decoded(model, prompts(1), SelfContrast(weak="rank=2@7", plan=plan))
    # DeepSeek-V3 admits half of the 8 experts for a token.
    with pytest.raises(ConfigError, match="rank = 5 is more than the 4 experts"):
        decoded(model_for("deepseek_v3"), prompts(1), SelfContrast(weak="rank=5", plan=plan))
    with pytest.raises(UnsupportedModel, match="is not a known MoE family"):
        decoded(dense_model("llama"), prompts(1), SelfContrast(plan=plan))
    with pytest.raises(ConfigError, match="assistant_model = 'given' does not go with SelfContrast"):
        SelfContrast(plan=plan).generate(model, prompts(1)[0], assistant_model=model)


def test_a_capacity_needs_the_plan_of_two_passes() -> None:
    model = tiny_model(capacity={"factor": 2.0})
    with pytest.raises(UnsupportedOverride, match=r"layer 1 has a capacity.*plan='two_passes'"):
        decoded(model, prompts(2), SelfContrast())
    assert decoded(model, prompts(2), SelfContrast(plan="two_passes")) == reference(model, prompts(2), beta=0.3)


@BOTH
def test_cancelled_by_streamers_criteria_and_errors(plan: Any) -> None:
    model, batch = model_for("mixtral"), padded(prompts(2))
    decoding = SelfContrast(plan=plan)
    before = model.generate(**batch, **GREEDY)
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]

    class Breaks(BaseStreamer):
        def __init__(self) -> None:
            self.left = 3

        def put(self, value: Any) -> None:
            self.left -= 1
            if not self.left:
                raise KeyboardInterrupt

        def end(self) -> None: ...

    def fails(input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        raise RuntimeError("mine")

    with pytest.raises(KeyboardInterrupt):
        decoding.generate(model, input_ids=batch["input_ids"][:1], streamer=Breaks(), **GREEDY)
    with pytest.raises(RuntimeError, match="mine"):
        model.generate(**batch, custom_generate=decoding, stopping_criteria=StoppingCriteriaList([fails]), **GREEDY)
    with pytest.raises(RuntimeError, match="mine"):
        model.generate(**batch, custom_generate=decoding, logits_processor=LogitsProcessorList([fails]), **GREEDY)
    assert torch.equal(model.generate(**batch, **GREEDY), before)
    assert hooks == [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]


def test_a_sampler_of_rows_draws_from_the_contrast() -> None:
    model, rows = model_for("mixtral"), prompts(2)
    found = decoded(model, rows, SelfContrast(), logits_processor=LogitsProcessorList([RowSampler([1, 2])]))
    assert found != decoded(model, rows, SelfContrast())
    assert found[1:] == decoded(
        model, rows[1:], SelfContrast(), logits_processor=LogitsProcessorList([RowSampler([2])])
    )
