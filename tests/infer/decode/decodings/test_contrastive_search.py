"""Contrastive search against the loop that its paper describes, written down plainly."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tests.infer.decode.decodings.prompts import GREEDY, continued, generated, padded
from tests.infer.decode.models import own, stock
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, T5Config, T5ForConditionalGeneration

from moesaic.errors import ConfigError, UnsupportedModel
from moesaic.infer.decode import ContrastiveSearch, override_routing


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {name: stock(name) for name in ("mixtral", "gpt2", "mistral")} | {"own": own()}


def cosine(a: list[float], b: list[float]) -> float:
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def chosen(model: Any, ids_S: Tensor, k: int, penalty: float) -> int:
    """The next token of one sequence, each of whose candidates is read with the whole sequence before it."""
    output = model(ids_S[None], output_hidden_states=True)
    context = output.hidden_states[-1][0].tolist()
    logits = output.logits[0, -1].tolist()
    total = sum(map(math.exp, logits))
    candidates = sorted(range(len(logits)), key=lambda token: -logits[token])[:k]
    longer = torch.stack([torch.cat([ids_S, torch.tensor([token])]) for token in candidates])
    states = model(longer, output_hidden_states=True).hidden_states[-1][:, -1].tolist()
    scores = [
        (1 - penalty) * math.exp(logits[token]) / total - penalty * max(cosine(state, before) for before in context)
        for token, state in zip(candidates, states, strict=True)
    ]
    return candidates[scores.index(max(scores))]


# A window of 6 tokens is shorter than the context.
@pytest.mark.parametrize(("name", "k", "penalty"), [("mixtral", 5, 0.6), ("own", 3, 0.3), ("mistral", 4, 0.9)])
def test_padded_prompts_equal_the_reference_loop(models, name, k, penalty):
    model, decoding = models[name], ContrastiveSearch(k=k, penalty=penalty)
    expected = continued(lambda ids_BS: torch.tensor([chosen(model, row, k, penalty) for row in ids_BS]), new_tokens=5)
    found = generated(model, decoding)
    assert [row[:5] for row in found] == expected
    assert found == generated(model, decoding, use_cache=False)
    assert found != generated(model, None)


@pytest.mark.parametrize("options", [{"k": 1}, {"penalty": 0.0}])
def test_without_choice_or_penalty_it_is_greedy(models, options):
    for name in ("mixtral", "gpt2"):
        assert generated(models[name], ContrastiveSearch(**options)) == generated(models[name], None)


def test_rows_do_not_depend_on_their_company(models):
    ids, mask = padded()
    together = generated(models["mixtral"], ContrastiveSearch())
    for row in (20, 4, 11):
        real = ids[row : row + 1, mask[row].bool()]
        alone = ContrastiveSearch().generate(models["mixtral"], real, attention_mask=torch.ones_like(real), **GREEDY)
        assert alone[0, real.shape[1] :].tolist() == together[row]


def test_ended_rows_are_padded_and_others_go_on(models):
    plain = generated(models["mixtral"], ContrastiveSearch())
    end = plain[0][2]
    found = generated(models["mixtral"], ContrastiveSearch(), eos_token_id=end, pad_token_id=0)
    for row, tokens in zip(found, plain, strict=True):
        stop = tokens.index(end) + 1 if end in tokens else len(tokens)
        assert row == tokens[:stop] + [0] * (len(row) - stop)


def test_tokens_that_are_ruled_out_never_win(models):
    class Two(LogitsProcessor):
        """Leaves two tokens."""

        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            kept = torch.full_like(scores, -torch.inf)
            kept[:, [7, 8]] = scores[:, [7, 8]]
            return kept

    found = generated(
        models["gpt2"], ContrastiveSearch(k=5, penalty=0.9), logits_processor=LogitsProcessorList([Two()])
    )
    assert {token for row in found for token in row} <= {7, 8}


def test_outputs(models):
    model, (ids, mask) = models["mixtral"], padded()
    options: dict[str, Any] = {**GREEDY, "attention_mask": mask, "return_dict_in_generate": True}
    streamed: list[Tensor] = []

    class Streamer:
        def put(self, value: Tensor) -> None:
            streamed.append(value)

        def end(self) -> None:
            pass

    out = ContrastiveSearch(k=3).generate(
        model, ids[:1], **{**options, "attention_mask": mask[:1]}, streamer=Streamer(), output_scores=True
    )
    assert torch.equal(torch.cat([value.reshape(-1) for value in streamed]), out.sequences[0])
    assert [int(score.argmax()) for score in out.scores] == out.sequences[0, ids.shape[1] :].tolist()
    assert all(int((score > -torch.inf).sum()) == 3 for score in out.scores)
    out = ContrastiveSearch(k=3).generate(model, ids, **options, output_hidden_states=True, output_logits=True)
    # As of greedy decoding: the last token is not in the cache.
    assert out.past_key_values.get_seq_length() == out.sequences.shape[1] - 1
    assert out.past_key_values.layers[0].keys.shape[0] == len(ids)
    assert [step[0].shape[:2] for step in out.hidden_states[1:]] == [(len(ids), 1)] * (len(out.hidden_states) - 1)
    whole = torch.cat([mask, mask.new_ones(len(ids), out.sequences.shape[1] - ids.shape[1])], 1)
    again = model(out.sequences, attention_mask=whole, position_ids=(whole.cumsum(1) - 1).clamp(min=0))
    torch.testing.assert_close(torch.stack(out.logits, 1), again.logits[:, ids.shape[1] - 1 : -1], rtol=1e-4, atol=1e-4)


def test_under_another_routing(models):
    with override_routing(models["mixtral"], "k=1"):
        found = generated(models["mixtral"], ContrastiveSearch())
        assert found == generated(models["mixtral"], ContrastiveSearch(), use_cache=False)
    assert found != generated(models["mixtral"], ContrastiveSearch())


def test_what_it_can_not_do_is_named(models):
    ids = torch.tensor([[5, 6]])

    def decode(model: Any = models["gpt2"], k: int = 5, penalty: float = 0.6, **options: Any) -> None:
        ContrastiveSearch(k=k, penalty=penalty).generate(model, ids, **{**GREEDY, **options})

    with pytest.raises(ConfigError, match="do_sample = True does not go with contrastive search"):
        decode(do_sample=True)
    with pytest.raises(ConfigError, match="num_beams = 2 do not go with contrastive search"):
        decode(num_beams=2)
    with pytest.raises(ConfigError, match=r"k = 65 is more than there are tokens \(64\)"):
        decode(k=65)
    with pytest.raises(ConfigError, match="cache_implementation = 'static'"):
        decode(models["mixtral"], cache_implementation="static")
    with pytest.raises(ValueError, match="penalty"):
        decode(penalty=1.5)
    with pytest.raises(ValueError, match="k"):
        decode(k=0)
    t5 = T5Config(vocab_size=64, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    with pytest.raises(UnsupportedModel, match="T5ForConditionalGeneration is no decoder"):
        decode(T5ForConditionalGeneration(t5), decoder_start_token_id=0)


def test_routing_to_as_many_experts_as_trained_is_bit_identical(models):
    ids, mask = padded()
    options = {**GREEDY, "attention_mask": mask, "return_dict_in_generate": True, "output_logits": True}
    for name in ("mixtral", "own"):
        plain = models[name].generate(ids, **options)
        with override_routing(models[name], "k=2"):
            ensemble = models[name].generate(ids, **options)
        assert torch.equal(ensemble.sequences, plain.sequences)
        assert torch.equal(torch.stack(ensemble.logits), torch.stack(plain.logits))
