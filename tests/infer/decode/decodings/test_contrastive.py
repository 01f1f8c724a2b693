"""Contrastive decoding against the loop that its papers describe, written down plainly."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from tests.infer.decode.decodings.prompts import GREEDY, continued, generated, padded
from tests.infer.decode.models import own, stock
from torch import Tensor
from transformers import T5Config, T5ForConditionalGeneration

from moesaic.errors import ConfigError, UnsupportedModel
from moesaic.infer.decode import ContrastiveDecoding
from moesaic.infer.decode.contrast import contrast, difference

PAIRS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "smaller dense amateur": ("mixtral", "llama", {}),
    # Another family, which has position embeddings of its own.
    "difference of log-probabilities": ("llama", "gpt2", {"beta": None, "amateur_temperature": 0.5}),
    "own model": ("own", "mixtral", {"alpha": 0.02, "beta": 1.5}),
}


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {name: stock(name) for name in ("mixtral", "llama", "gpt2")} | {"own": own()}


def chosen(expert: list[float], amateur: list[float], alpha: float, beta: float | None, temperature: float) -> int:
    """The next token by its logits, one candidate after the other."""
    amateur = [logit / temperature for logit in amateur]
    expert_sum, amateur_sum = (math.log(sum(map(math.exp, logits))) for logits in (expert, amateur))
    best, best_score = -1, -math.inf
    for token, (strong, weak) in enumerate(zip(expert, amateur, strict=True)):
        if strong < max(expert) + math.log(alpha):
            continue
        plain = (strong - expert_sum) - (weak - amateur_sum)
        score = plain if beta is None else (1 + beta) * strong - beta * weak
        if score > best_score:
            best, best_score = token, score
    return best


@pytest.mark.parametrize("pair", PAIRS)
def test_padded_prompts_equal_the_reference_loop(models, pair):
    expert, amateur, options = PAIRS[pair]
    loop: tuple[float, float | None, float] = (
        options.get("alpha", 0.1),
        options.get("beta", 0.5),
        options.get("amateur_temperature", 1.0),
    )

    def reference(ids_BS: Tensor) -> Tensor:
        rows = zip(*(models[name](ids_BS).logits[:, -1].tolist() for name in (expert, amateur)), strict=True)
        return torch.tensor([chosen(strong, weak, *loop) for strong, weak in rows])

    decoding = ContrastiveDecoding(amateur=models[amateur], **options)
    expected = continued(reference)
    assert generated(models[expert], decoding) == expected
    assert generated(models[expert], decoding, use_cache=False) == expected
    assert generated(models[expert], None) != expected


def test_worked_numbers():
    expert_BV, amateur_BV = torch.tensor([[2.0, 1.5, 0.0, -1.0]]), torch.tensor([[2.0, 0.4, -1.0, -1.0]])
    linear = contrast(expert_BV, amateur_BV, alpha=0.1, beta=0.5)
    assert linear[0, :3].tolist() == pytest.approx([2.0, 2.05, 0.5])
    # Log-probabilities are logits less 2.5831 and 2.2635, their logarithms of summed exponentials.
    plain = difference(expert_BV, amateur_BV, alpha=0.1)
    assert plain[0, :3].tolist() == pytest.approx([-0.3196, 0.7804, 0.6804], abs=1e-4)
    assert linear[0, 3] == plain[0, 3] == -torch.inf


@pytest.mark.parametrize("options", [{}, {"beta": 3.0}, {"alpha": 1e-6, "beta": 20.0}])
def test_an_expert_that_is_its_own_amateur_decodes_greedily(models, options):
    decoding = ContrastiveDecoding(amateur=models["mixtral"], **options)
    assert generated(models["mixtral"], decoding) == generated(models["mixtral"], None)


def test_the_likeliest_tokens_alone_are_greedy(models):
    greedy = generated(models["mixtral"], None)
    assert generated(models["mixtral"], ContrastiveDecoding(amateur=models["gpt2"], alpha=1.0, beta=5.0)) == greedy
    assert generated(models["mixtral"], ContrastiveDecoding(amateur=models["gpt2"], beta=0.0)) == greedy


def test_rows_do_not_depend_on_their_company(models):
    ids, mask = padded()
    decoding = ContrastiveDecoding(amateur=models["llama"])
    together = generated(models["mixtral"], decoding)
    order = torch.tensor([20, 4, 11])
    some = decoding.generate(models["mixtral"], ids[order], attention_mask=mask[order], **GREEDY)
    assert some[:, ids.shape[1] :].tolist() == [together[row] for row in order]


def test_beams_take_the_amateurs_cache_along(models):
    decoding = ContrastiveDecoding(amateur=models["gpt2"], beta=1.0)
    beams = {"num_beams": 3, "num_return_sequences": 2}
    cached = generated(models["mixtral"], decoding, **beams)
    assert cached == generated(models["mixtral"], decoding, use_cache=False, **beams)
    assert cached[::2] != generated(models["mixtral"], decoding)


def test_sampling_stays_among_plausible_tokens(models):
    model, ids = models["llama"], torch.randint(3, 64, (1, 6), generator=torch.Generator().manual_seed(0))
    decoding = ContrastiveDecoding(amateur=models["gpt2"], alpha=0.3)
    out = decoding.generate(model, ids.expand(64, 6), **{**GREEDY, "do_sample": True, "top_k": 0, "max_new_tokens": 1})
    expert_V = model(ids).logits[0, -1]
    plausible = (expert_V >= expert_V.max() + math.log(0.3)).nonzero()[:, 0].tolist()
    assert set(out[:, -1].tolist()) == set(plausible)


def test_an_amateur_is_loaded_from_its_folder_once(models, tmp_path):
    models["llama"].save_pretrained(tmp_path)
    decoding = ContrastiveDecoding.from_dict({"type": "contrastive", "amateur": str(tmp_path)})
    assert generated(models["mixtral"], decoding) == generated(
        models["mixtral"], ContrastiveDecoding(amateur=models["llama"])
    )
    first = decoding.amateur_model
    generated(models["mixtral"], decoding, max_new_tokens=1)
    assert decoding.amateur_model is first
    assert not first.training
    again = ContrastiveDecoding.from_dict(json.loads(json.dumps(decoding.to_dict())))
    assert again == decoding == ContrastiveDecoding(amateur=tmp_path)


def test_bad_amateurs_are_named(models, tmp_path):
    ids = torch.tensor([[5, 6]])

    def decode(**options: Any) -> None:
        ContrastiveDecoding(**options).generate(models["llama"], ids, **GREEDY)

    with pytest.raises(ConfigError, match=r"amateur = '.*missing' is not a folder"):
        decode(amateur=tmp_path / "missing")
    with pytest.raises(ConfigError, match="of 65 tokens' has another vocabulary than the model, which has 64"):
        decode(amateur=stock("llama", vocab_size=65))
    with pytest.raises(ValueError, match="amateur = 7 is no model"):
        decode(amateur=7)
    with pytest.raises(ValueError, match="amateur = 'LlamaForCausalLM' was never saved"):
        ContrastiveDecoding(amateur=stock("llama")).to_dict()
    t5 = T5Config(vocab_size=64, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    with pytest.raises(UnsupportedModel, match="T5ForConditionalGeneration can't read along"):
        decode(amateur=T5ForConditionalGeneration(t5))
    for field, value in (("beta", -0.1), ("alpha", 0.0), ("amateur_temperature", 0.0)):
        with pytest.raises(ValueError, match=field):
            decode(amateur=models["llama"], **{field: value})
    decoding = ContrastiveDecoding(amateur=models["gpt2"])
    embeds = models["llama"].get_input_embeddings()(ids)
    with pytest.raises(ConfigError, match="inputs_embeds"):
        models["llama"].generate(inputs_embeds=embeds, custom_generate=decoding, **GREEDY)
