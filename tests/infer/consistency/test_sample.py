"""Samples: seeds, padding, ends, what they cost; votes and best-of-n over them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.infer.consistency.text_models import Fixed, character_tokenizer, text_model
from transformers import GenerationConfig, LogitsProcessorList

from moesaic.errors import ConfigError
from moesaic.infer.consistency import (
    Continuation,
    Generate,
    RowSampler,
    Sampler,
    best_of,
    last_number,
    likelihood_weights,
    log_likelihoods,
    mean_log_probability,
    row_seed,
    self_consistency,
    whole,
)
from moesaic.infer.decode.row_sampler import warpers

PROMPTS = ["12+7=", "a", "the longest prompt of all", "12+7=?"]
TOKENIZER = character_tokenizer()


@pytest.fixture(scope="module", params=["own", "mixtral", "qwen3_moe", "llama"])
def model(request: pytest.FixtureRequest) -> Any:
    return text_model(request.param)


def sampling(**options: Any) -> Generate:
    return Generate(do_sample=True, **options)


def test_a_sample_is_the_same_in_any_company(model: Any) -> None:
    wanted = [(prompt, number) for prompt in PROMPTS for number in range(2)]

    def draw(batch_size: int, order: list[tuple[str, int]]) -> dict[tuple[str, int], str]:
        sampler = Sampler(model, TOKENIZER, sampling(), max_new_tokens=6, batch_size=batch_size, seed=3)
        return {key: sample.text for key, sample in zip(order, sampler.draw(order), strict=True)}

    alone = draw(1, wanted)
    assert draw(8, wanted) == alone
    assert draw(3, wanted[::-1]) == alone
    assert len(set(alone.values())) > 4
    other = Sampler(model, TOKENIZER, sampling(), max_new_tokens=6, seed=4).draw(wanted)
    assert {sample.text for sample in other} != set(alone.values())


def test_greedy_rows_equal_generate_of_each_alone(model: Any) -> None:
    samples = Sampler(model, TOKENIZER, Generate(), max_new_tokens=5).draw([(prompt, 0) for prompt in PROMPTS])
    for prompt, sample in zip(PROMPTS, samples, strict=True):
        ids = torch.tensor([TOKENIZER(prompt).input_ids])
        alone = model.generate(input_ids=ids, max_new_tokens=5, do_sample=False)[0, ids.shape[1] :]
        assert list(sample.ids) == alone.tolist()
        assert sample.prompt_ids == tuple(ids[0].tolist())


def test_sampling_is_repeatable_with_a_custom_loop_and_leaves_the_generator(model: Any) -> None:
    def loop(model: Any, input_ids: Any, generation_config: Any = None, **rest: Any) -> Any:
        for _ in range(generation_config.max_new_tokens):
            logits = model(input_ids=input_ids).logits[:, -1]
            input_ids = torch.cat([input_ids, torch.multinomial(logits.softmax(-1), 1)], dim=1)
        return input_ids

    torch.manual_seed(11)
    before = torch.random.get_rng_state()
    sampler = Sampler(model, TOKENIZER, Generate(custom_generate=loop), max_new_tokens=4)
    first, second = (sampler.draw([("12+7=", 0), ("12+7=", 1)]) for _ in range(2))
    assert [sample.ids for sample in first] == [sample.ids for sample in second]
    assert first[0].ids != first[1].ids
    assert torch.equal(torch.random.get_rng_state(), before)


def test_frequencies_follow_the_warped_softmax() -> None:
    logits_V = torch.tensor([2.0, 1.0, 0.0, -1.0, float("-inf"), 0.5])
    config = GenerationConfig(temperature=0.7, top_k=4)
    draws = 10_000
    scores = RowSampler([row_seed(0, "x", number) for number in range(draws)], warpers(config))(
        torch.zeros(draws, 1, dtype=torch.long), logits_V.expand(draws, -1)
    )
    assert ((scores == 0).sum(-1) == 1).all()
    counts_V = torch.bincount(scores.argmax(-1), minlength=6)
    kept_V = torch.tensor([True, True, True, False, False, True])
    expected_V = (logits_V / 0.7).masked_fill(~kept_V, -torch.inf).softmax(-1) * draws
    assert not counts_V[~kept_V].any()
    chi_square = ((counts_V - expected_V)[kept_V] ** 2 / expected_V[kept_V]).sum()
    assert chi_square < 16.3  # p = 0.001 at 3 degrees of freedom


def test_warpers_are_those_of_generate() -> None:
    config = GenerationConfig(
        do_sample=True,
        temperature=0.7,
        top_k=9,
        top_p=0.8,
        min_p=0.05,
        typical_p=0.9,
        epsilon_cutoff=0.01,
        eta_cutoff=0.01,
    )
    model = text_model("llama")
    scores, ids = torch.randn(3, 64), torch.ones(3, 2, dtype=torch.long)
    theirs = model._get_logits_processor(config, logits_processor=LogitsProcessorList())
    assert [type(processor) for processor in warpers(config)] == [type(processor) for processor in theirs]
    assert torch.equal(warpers(config)(ids, scores), theirs(ids, scores))


@pytest.mark.parametrize("pad", ["<pad>", "</s>"])
def test_rows_end_at_stop_texts_and_end_tokens(pad: str) -> None:
    tokenizer = character_tokenizer(pad_token=pad)
    model = text_model("mixtral")
    plain = Sampler(model, tokenizer, sampling(), max_new_tokens=12, seed=1)
    wanted = [(prompt, number) for prompt in PROMPTS for number in range(3)]
    full = plain.draw(wanted)
    stop = full[0].text[3:5]
    stopped = Sampler(model, tokenizer, sampling(), max_new_tokens=12, seed=1, stop=[stop])
    samples = stopped.draw(wanted)
    assert samples[0].ended == "stop"
    for sample, whole_sample in zip(samples, full, strict=True):
        assert sample.text == whole_sample.text.split(stop)[0]
        assert sample.ids == whole_sample.ids[: len(sample.ids)]
    texts = [tokenizer.decode(samples[0].ids[:end], skip_special_tokens=True) for end in (-1, None)]
    assert [stop in text for text in texts] == [False, True]
    assert stopped.usage.generated_tokens == sum(len(sample.ids) for sample in samples)
    assert stopped.usage.prompt_tokens == 3 * sum(map(len, PROMPTS))
    assert stopped.usage.seconds > 0
    ended = Sampler(model, tokenizer, sampling(eos_token_id=int(full[0].ids[2])), max_new_tokens=12, seed=1).draw(
        wanted[:4]
    )
    assert (ended[0].ended, ended[0].ids) == ("eos", full[0].ids[:3])


def test_a_stop_text_is_not_found_across_the_prompt() -> None:
    decoding = Fixed(TOKENIZER, {"a\n": ["\nb"]})
    (sample,) = Sampler(text_model("llama"), TOKENIZER, decoding, max_new_tokens=9, stop=["\n\n"]).draw([("a\n", 0)])
    assert (sample.text, sample.ended) == ("\nb", "eos")
    model = text_model("llama")
    wanted = [("a\n", 0)]
    free = Sampler(model, TOKENIZER, sampling(), max_new_tokens=8).draw(wanted)
    first = free[0].text[0]
    same = Sampler(model, TOKENIZER, sampling(), max_new_tokens=8, stop=["\n" + first]).draw(wanted)
    assert same[0].text == free[0].text


def test_early_stop_keeps_the_winner_and_saves_samples() -> None:
    texts = {"p": ["4", "x", "4", "5", "4", "4", "4", "9"], "q": ["1", "2", "2", "1", "3", "x", "2", "1"]}
    results = []
    for early in (True, False):
        decoding = Fixed(TOKENIZER, texts)
        sampler = Sampler(text_model("llama"), TOKENIZER, decoding, max_new_tokens=9, batch_size=4)
        results.append(self_consistency(sampler, ["p", "q"], last_number(), samples=8, early_stop=early))
        assert max(decoding.batches) <= 4
    early, full = results
    assert [found.answer for found in early] == [found.answer for found in full] == ["4", "1"]
    assert len(early[0].samples) == 6
    assert len(full[0].samples) == len(full[1].samples) == 8
    assert full[0].answers == ("4", None, "4", "5", "4", "4", "4", "9")
    assert full[1].vote.abstentions == 1
    assert full[1].vote.shares == pytest.approx({"1": 3 / 7, "2": 3 / 7, "3": 1 / 7})


def test_nobody_answers() -> None:
    sampler = Sampler(text_model("llama"), TOKENIZER, Fixed(TOKENIZER, {"p": ["x"] * 3}), max_new_tokens=9)
    (found,) = self_consistency(sampler, ["p"], last_number(), samples=3)
    assert (found.answer, found.vote.abstentions, found.vote.shares) == (None, 3, {})


def test_weights_and_best_of_follow_the_likelihood(model: Any) -> None:
    sampler = Sampler(model, TOKENIZER, sampling(), max_new_tokens=4, seed=5)
    (best,) = best_of(sampler, ["12+"], mean_log_probability(model), samples=5)
    for sample, score in zip(best.samples, best.scores, strict=True):
        ids = torch.tensor([sample.prompt_ids + sample.ids])
        with torch.no_grad():
            log_p_SV = model(input_ids=ids).logits[0].log_softmax(-1)
        each = [log_p_SV[place - 1, ids[0, place]].item() for place in range(3, ids.shape[1])]
        assert score == pytest.approx(sum(each) / len(each), abs=1e-4)
    assert best.scores[best.samples.index(best.sample)] == max(best.scores)
    (consensus,) = self_consistency(
        sampler, ["12+"], whole(), samples=5, weigh=likelihood_weights(model), largest_weight=1.0
    )
    assert all(0 < weight <= 1 for weight in consensus.weights)
    assert consensus.samples == best.samples[: len(consensus.samples)]
    tied = best_of(sampler, ["12+"], lambda samples: [1.0] * len(samples), samples=3)
    assert tied[0].sample.number == 0


def test_likelihoods_equal_a_plain_loop(model: Any) -> None:
    generator = torch.Generator().manual_seed(2)
    rows = [
        Continuation(tuple(torch.randint(3, 60, (length,), generator=generator).tolist()), start)
        for length, start in [(9, 3), (2, 1), (14, 13), (5, 5), (9, 1), (30, 2)]
    ]
    found = log_likelihoods(model, rows, batch_size=4)
    for row, scores in zip(rows, found, strict=True):
        with torch.no_grad():
            log_p_SV = model(input_ids=torch.tensor([row.ids])).logits[0].log_softmax(-1)
        plain = [log_p_SV[place - 1, row.ids[place]].item() for place in range(row.start, len(row.ids))]
        assert list(scores) == pytest.approx(plain, abs=1e-4)


def test_bad_input_is_named() -> None:
    model = text_model("mixtral")
    unpadded = character_tokenizer()
    unpadded.pad_token = None
    with pytest.raises(ConfigError, match=r"tokenizer\.pad_token.*is missing.*eos_token"):
        Sampler(model, unpadded, Generate())
    assert Sampler(model, unpadded, Generate(), pad_token_id=2, max_new_tokens=1).draw([("a", 0), ("bc", 0)])
    greedy = Sampler(model, TOKENIZER, Generate(), max_new_tokens=1)
    with pytest.raises(ConfigError, match=r"samples = 3 .* all equal"):
        self_consistency(greedy, ["a"], whole(), samples=3)
    with pytest.raises(ConfigError, match="samples = 0"):
        best_of(greedy, ["a"], mean_log_probability(model), samples=0)
    with pytest.raises(ConfigError, match="max_new_tokens = 0"):
        Sampler(model, TOKENIZER, Generate(), max_new_tokens=0)
    with pytest.raises(ConfigError, match="stop"):
        Sampler(model, TOKENIZER, Generate(), stop="ab")
    with pytest.raises(ConfigError, match="256 positions"):
        Sampler(model, TOKENIZER, Generate(), max_new_tokens=250).draw([("a long prompt", 0)])
    with pytest.raises(ConfigError, match="score"):
        best_of(greedy, ["a"], lambda samples: [float("nan")], samples=1)
