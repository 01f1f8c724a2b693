"""DoLa against the loop that its paper describes, written down plainly."""

from __future__ import annotations

import math
from typing import Any, cast

import pytest
import torch
from tests.infer.decode.decodings.prompts import GREEDY, continued, generated, padded
from tests.infer.decode.models import own, stock
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, T5Config, T5ForConditionalGeneration

from moesaic.errors import ConfigError, UnsupportedModel
from moesaic.infer.decode import EarlyExitContrast
from moesaic.infer.decode.contrast import distance

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "one candidate": ("llama", {"layers": (1,), "alpha": 0.3}),
    "mixture of experts": ("mixtral", {"layers": (0, 1, 2)}),
    "official divergence": ("mixtral", {"layers": (0, 1, 2), "divergence": "official"}),
    "own model, with norm": ("own", {"layers": (0, 1, 2), "normalise": True}),
    "head that caps logits": ("gemma2", {"layers": (0, 2), "normalise": True}),
}


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {name: stock(name) for name in ("mixtral", "llama", "gemma2")} | {"own": own()}


def probabilities(logits: list[float]) -> list[float]:
    highest = max(logits)
    exponentials = [math.exp(logit - highest) for logit in logits]
    return [value / sum(exponentials) for value in exponentials]


def kullback_leibler(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def chosen(last: list[float], exits: list[list[float]], alpha: float, divergence: str) -> int:
    """The next token by the logits of the last layer and of the candidates."""
    p = probabilities(last)
    farthest, most = [], -1.0
    for q in map(probabilities, exits):
        mixture = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
        if divergence == "official":
            apart = kullback_leibler(mixture, p) + kullback_leibler(mixture, q)
        else:
            apart = kullback_leibler(p, mixture) + kullback_leibler(q, mixture)
        if apart > most:
            farthest, most = q, apart
    scores = [math.log(a / b) if a >= alpha * max(p) else -math.inf for a, b in zip(p, farthest, strict=True)]
    return scores.index(max(scores))


def final_norm(model: Any) -> nn.Module:
    decoder = model.get_decoder()
    return getattr(decoder, "backbone", decoder).norm


@pytest.mark.parametrize("case", CASES)
def test_padded_prompts_equal_the_reference_loop(models, case):
    name, options = CASES[case]
    model, cap = models[name], 2.0 if name == "gemma2" else None
    norm = final_norm(model) if options.get("normalise") else nn.Identity()

    def reference(ids_BS: Tensor) -> Tensor:
        output = model(ids_BS, output_hidden_states=True)
        exits = [model.lm_head(norm(output.hidden_states[layer][:, -1])) for layer in options["layers"]]
        exits = [exit_BV if cap is None else cap * (exit_BV / cap).tanh() for exit_BV in exits]
        by_row = torch.stack(exits, 1).tolist()
        alpha, divergence = options.get("alpha", 0.1), options.get("divergence", "jensen_shannon")
        rows = zip(output.logits[:, -1].tolist(), by_row, strict=True)
        return torch.tensor([chosen(last, row, alpha, divergence) for last, row in rows])

    decoding, expected = EarlyExitContrast(**options), continued(reference)
    assert generated(model, decoding) == expected
    assert generated(model, decoding, use_cache=False) == expected
    assert generated(model, None) != expected


def test_divergences_of_worked_numbers():
    last_BV, exit_BV = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.9, 0.1]]).log()
    # Mixture (.7, .3). Jensen-Shannon: (.5 ln(.5/.7) + .5 ln(.5/.3) + .9 ln(.9/.7) + .1 ln(.1/.3)) / 2.
    assert distance(last_BV, exit_BV[None], "jensen_shannon").item() == pytest.approx(0.10175, abs=1e-5)
    # The other way round: (.7 ln(.7/.5) + .3 ln(.3/.5) + .7 ln(.7/.9) + .3 ln(.3/.1)) / 2.
    assert distance(last_BV, exit_BV[None], "official").item() == pytest.approx(0.11797, abs=1e-5)
    same_LB = distance(last_BV, torch.stack([last_BV, exit_BV]), "jensen_shannon")
    assert same_LB[0].item() == pytest.approx(0, abs=1e-7)


def test_ruled_out_tokens_are_no_distance():
    last_BV, exit_BV = torch.tensor([[0.0, 0.0, -torch.inf]]), torch.tensor([[2.0, 0.0, -torch.inf]])
    for divergence in ("jensen_shannon", "official"):
        found = distance(last_BV, exit_BV[None], divergence)
        assert found.item() == pytest.approx(distance(last_BV[:, :2], exit_BV[None, :, :2], divergence).item())


@pytest.mark.parametrize(
    ("layers", "tied", "low", "high"),
    [
        (1, False, (0,), (0,)),
        (2, True, (1,), (1,)),
        (3, True, (2,), (1,)),
        (6, False, (0, 2), (3, 5)),
        (8, True, (2,), (4, 6)),
        (42, False, tuple(range(0, 20, 2)), tuple(range(22, 42, 2))),
        (42, True, tuple(range(2, 20, 2)), tuple(range(22, 42, 2))),
    ],
)
def test_buckets(layers, tied, low, high):
    model = _shallow(layers, tied)
    assert EarlyExitContrast().candidates(model) == EarlyExitContrast(layers="low").candidates(model) == low
    assert EarlyExitContrast(layers="high").candidates(model) == high


def _shallow(layers: int, tied: bool) -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=4,
        intermediate_size=4,
        num_hidden_layers=layers,
        num_attention_heads=1,
        tie_word_embeddings=tied,
    )
    with torch.device("meta"):
        return LlamaForCausalLM(config)


def test_rows_pick_their_layers_by_themselves(models):
    ids, mask = padded()
    decoding = EarlyExitContrast(layers=(0, 1, 2))
    together = generated(models["mixtral"], decoding)
    for row in (20, 4, 11):
        real = ids[row : row + 1, mask[row].bool()]
        alone = decoding.generate(models["mixtral"], real, attention_mask=torch.ones_like(real), **GREEDY)
        assert alone[0, real.shape[1] :].tolist() == together[row]


def test_the_likeliest_tokens_alone_are_greedy(models):
    assert generated(models["llama"], EarlyExitContrast(alpha=1.0)) == generated(models["llama"], None)


def test_the_penalty_acts_on_the_contrast_and_bans_before_it(models):
    model, ids = models["llama"], torch.tensor([[5, 9, 5, 30]])
    options: dict[str, Any] = {**GREEDY, "max_new_tokens": 1, "return_dict_in_generate": True, "output_scores": True}
    decoding = EarlyExitContrast(layers=(1,), alpha=1e-9)

    def scores(**more: Any) -> Tensor:
        return decoding.generate(model, ids, **options, **more).scores[0][0]

    plain, penalised = scores(), scores(repetition_penalty=2.0)
    seen = torch.tensor([5, 9, 30])
    expected = plain.clone()
    expected[seen] = torch.where(plain[seen] < 0, plain[seen] * 2, plain[seen] / 2)
    torch.testing.assert_close(penalised, expected)

    # The one plausible token is ruled out: the likeliest of the others takes its place.
    sure = EarlyExitContrast(layers=(1,), alpha=1.0)
    likeliest = int(model(ids).logits[0, -1].argmax())
    found = sure.generate(model, ids, **{**GREEDY, "max_new_tokens": 1}, suppress_tokens=[likeliest])
    assert int(found[0, -1]) == int(model(ids).logits[0, -1].topk(2).indices[1])


def test_beams_and_hidden_states(models):
    decoding = EarlyExitContrast(layers=(0, 1))
    cached = generated(models["llama"], decoding, num_beams=3)
    assert cached == generated(models["llama"], decoding, num_beams=3, use_cache=False)
    ids, mask = padded()
    options = {**GREEDY, "return_dict_in_generate": True, "attention_mask": mask, "output_logits": True}
    out = decoding.generate(models["llama"], ids, **options)
    assert out.hidden_states is None
    out = decoding.generate(models["llama"], ids, output_hidden_states=True, **options)
    assert len(out.hidden_states[0]) == 4
    # Logits are the model's own.
    torch.testing.assert_close(out.logits[0], models["llama"](ids, attention_mask=mask).logits[:, -1])


def test_bad_layers_and_models_are_named(models):
    ids = torch.tensor([[5, 6]])
    for layers in ((), (0, 0), (-1,), "middle"):
        with pytest.raises(ValueError, match="layers"):
            EarlyExitContrast(layers=layers)  # type: ignore[arg-type]
    with pytest.raises(
        ConfigError, match=r"layers = \(1, 3\) are not all before the last of 3; give numbers from 0 to 2"
    ):
        EarlyExitContrast(layers=(1, 3)).generate(models["llama"], ids, **GREEDY)
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=64, d_model=8, d_kv=4, d_ff=8, num_layers=2, num_heads=2))
    with pytest.raises(UnsupportedModel, match="T5ForConditionalGeneration is no decoder with a head"):
        EarlyExitContrast().generate(t5, ids, decoder_start_token_id=0, **GREEDY)


def test_a_head_that_does_more_than_is_known_is_refused():
    class Scaled(LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.logits = output["logits"] * 0.5
            return output

    model = Scaled(cast(LlamaConfig, stock("llama").config)).eval()
    with pytest.raises(UnsupportedModel, match="Scaled does more between its last hidden state and its logits"):
        EarlyExitContrast(layers=(1,)).generate(model, torch.tensor([[5, 6]]), **GREEDY)
