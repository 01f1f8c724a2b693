"""Decodings from texts, YAML and objects, and what they run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.infer.consistency.text_models import character_tokenizer, text_model
from tests.infer.decode.models import GREEDY, padded_ids
from torch import Tensor
from transformers import GenerationConfig

import moesaic
from moesaic.errors import ConfigError
from moesaic.infer.consistency import Sampler, SpecDecoding
from moesaic.infer.decode import (
    ContrastiveDecoding,
    ContrastiveSearch,
    DecodingSpec,
    EarlyExitContrast,
    OverrideSpec,
    SelfContrast,
    count_positions,
)

TEXTS = {
    "greedy": DecodingSpec(),
    "greedy override=k=4": DecodingSpec(override=OverrideSpec.of("k=4")),
    "sample temperature=0.7": DecodingSpec(temperature=0.7),
    "sample temperature=1 top_p=0.9 top_k=5 min_p=0.05": DecodingSpec(temperature=1.0, top_p=0.9, top_k=5, min_p=0.05),
    "beam num_beams=4": DecodingSpec(num_beams=4),
    "beam temperature=0.5 num_beams=2": DecodingSpec(num_beams=2, temperature=0.5),
    "self-contrast": DecodingSpec(strategy=SelfContrast()),
    "self-contrast weak=rank=3 beta=0.5 plan=two_passes temperature=0.7": DecodingSpec(
        strategy=SelfContrast(beta=0.5, weak=OverrideSpec.of("rank=3"), plan="two_passes"), temperature=0.7
    ),
    "contrastive amateur=some/folder beta=none": DecodingSpec(
        strategy=ContrastiveDecoding(amateur="some/folder", beta=None)
    ),
    "contrastive 'amateur=a folder' num_beams=2": DecodingSpec(
        strategy=ContrastiveDecoding(amateur="a folder"), num_beams=2
    ),
    "contrastive-search k=4 penalty=0.5": DecodingSpec(strategy=ContrastiveSearch(k=4, penalty=0.5)),
    "dola": DecodingSpec(strategy=EarlyExitContrast()),
    "dola layers=high normalise=true": DecodingSpec(strategy=EarlyExitContrast(layers="high", normalise=True)),
    "dola layers=0,2 temperature=0.5": DecodingSpec(strategy=EarlyExitContrast(layers=(0, 2)), temperature=0.5),
    "self-contrast weak=rank=2,3@0-2,5+scale=2 eos_ban=official override=without=1": DecodingSpec(
        strategy=SelfContrast(weak=OverrideSpec.of("rank=2,3@0-2,5+scale=2"), eos_ban="official"),
        override=OverrideSpec.of("without=1"),
    ),
}


@pytest.mark.parametrize(("text", "spec"), TEXTS.items(), ids=list(TEXTS))
def test_texts_and_back(text: str, spec: DecodingSpec) -> None:
    assert DecodingSpec.of(text) == spec
    assert spec.text == spec.label == text
    assert DecodingSpec.from_dict(spec.to_dict()) == DecodingSpec.of(spec) == spec


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("sample", "sample temperature=1"),
        ("beam", "beam num_beams=4"),
        ("self_contrast beta=0.30", "self-contrast"),
        ("early-exit layers=1", "dola layers=1"),
        ("self-contrast preset=reasoning", "self-contrast beta=0.5"),
        ("self-contrast preset=code weak=rank=3", "self-contrast weak=rank=3 beta=0.1"),
        ("self-contrast preset=code beta=0.7", "self-contrast beta=0.7"),
        ("self-contrast eos_ban=none temperature=0", "self-contrast"),
        ("greedy  'override=k=4 + scale=2'", "greedy override=k=4+scale=2"),
    ],
)
def test_other_spellings(text: str, same: str) -> None:
    assert DecodingSpec.of(text).text == same


@pytest.mark.parametrize(
    "override",
    [
        *(
            "k=4",
            "rank=1,3",
            "random=2:7",
            "random=1",
            "experts=0,3@1",
            "without=5",
            "dynamic=0.5",
            "dynamic=0.5:3@0,2-3",
        ),
        *("null=0.1", "null=0.1:kept", "total=1+temperature=0.25", "replay=some/folder"),
    ],
)
def test_overrides_as_texts(override: str) -> None:
    assert OverrideSpec.of(override).text == override


def test_what_no_text_says_has_a_label() -> None:
    spec = DecodingSpec(override=OverrideSpec.of({"type": "replay", "replay": "folder", "weights": "trace"}))
    with pytest.raises(ConfigError, match=r"replay\.weights = 'trace' can't be said in a text"):
        _ = spec.text
    assert '"weights":"trace"' in spec.label


def test_yaml(tmp_path: Path) -> None:
    (tmp_path / "code.yaml").write_text(
        "strategy: {type: self_contrast, preset: code}\ntemperature: 0.5\noverride: k=3\n"
    )
    wanted = "self-contrast beta=0.1 temperature=0.5 override=k=3"
    assert DecodingSpec.of(tmp_path / "code.yaml").text == DecodingSpec.of(str(tmp_path / "code.yaml")).text == wanted
    (tmp_path / "again.yaml").write_text(DecodingSpec.of(wanted).to_yaml())
    assert DecodingSpec.of(tmp_path / "again.yaml").text == wanted


def test_grids() -> None:
    found = DecodingSpec.grid_of("self-contrast weak=rank={1,3} beta={0.1, 0.5}")
    assert [spec.text for spec in found] == [
        f"self-contrast weak=rank={rank} beta={beta}" for rank in (1, 3) for beta in (0.1, 0.5)
    ]
    found = DecodingSpec.grid_of(["greedy override=k={1..3}", SelfContrast(beta=0.7)])
    assert [spec.text for spec in found] == [
        *(f"greedy override=k={k}" for k in (1, 2, 3)),
        "self-contrast beta=0.7",
    ]
    assert [spec.text for spec in DecodingSpec.grid_of("{greedy,sample}", top_p=None)] == [
        "greedy",
        "sample temperature=1",
    ]
    for text in ("greedy override=k={1..", "greedy override=k={3..1}", "greedy override=k={}", "greedy {a{b}}"):
        with pytest.raises(ConfigError, match="has braces"):
            DecodingSpec.grid_of(text)


def test_options_fill_what_is_left_open() -> None:
    assert DecodingSpec.of("self-contrast", temperature=0.7, top_p=None).text == "self-contrast temperature=0.7"
    assert DecodingSpec.of("sample", temperature=0.7).text == "sample temperature=0.7"
    assert DecodingSpec.of("self-contrast temperature=0.70", temperature=0.7).text == "self-contrast temperature=0.7"
    assert DecodingSpec.of(DecodingSpec(num_beams=2), temperature=0.5).text == "beam temperature=0.5 num_beams=2"
    for text in ("greedy", "sample temperature=0.5", "self-contrast temperature=0"):
        with pytest.raises(ConfigError, match=r"temperature = 0.7 is another than that of the decoding"):
            DecodingSpec.of(text, temperature=0.7)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "decode = '' says nothing"),
        ("gredy", "decode = 'gredy' is no decoding; did you mean 'greedy'"),
        ("self-contrast bta=1", "decode.bta = '1' is not a field of self-contrast; did you mean 'beta'"),
        ("greedy beta=1", "decode.beta = '1' is not a field of greedy; known here: temperature"),
        ("self-contrast beta", "has a word that is no field: 'beta'"),
        ("self-contrast beta=1 beta=2", "decode.beta = '2' stands there twice"),
        ("self-contrast beta=-1", "decode.beta = '-1' is not valid"),
        ("self-contrast alpha=0", "decode.alpha = '0' is not valid"),
        ("self-contrast plan=three", "decode.plan = 'three' is not one of the choices; choose one of 'two_rows'"),
        ("self-contrast preset=prose", "decode.preset = 'prose' is not a preset; choose one of reasoning, code"),
        ("self-contrast weak=rnk=1", "decode.weak.override = 'rnk=1' has a part that is none"),
        ("self-contrast beta={1,2}", "is a grid, and one decoding is wanted"),
        ("contrastive-search temperature=1", "decode.temperature = 1.0 does not go with contrastive-search"),
        ("contrastive-search num_beams=2", "decode.num_beams = 2 does not go with contrastive-search"),
        ("contrastive", "decode.amateur = None is required"),
        ("dola layers=lo", "decode.layers = 'lo' is not one of the choices; choose one of 'low' or 'high'"),
        ("greedy override=k=0", "decode.override.parts.0.k = 0 is not valid"),
        ("greedy temperature=1", "decode.temperature = '1' is not greedy; use sample"),
        ("greedy num_beams=2", "decode.num_beams = '2' is not greedy; use beam"),
        ("beam num_beams=1", "decode.num_beams = '1' is no beam search"),
        ("sample temperature=0", "decode.temperature = '0' does not sample; use greedy"),
        ("sample temperature=warm", "decode.temperature = 'warm' is not valid"),
        ("greedy top_p=0.9", "decode.top_p = 0.9 is for sampling, and the temperature is 0"),
        ("greedy 'a", "can't be read"),
        ("nowhere.yaml", "config = 'nowhere.yaml' is not a file"),
    ],
)
def test_mistakes_are_named(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        DecodingSpec.of(text)
    assert message in str(caught.value)


def test_nothing_is_no_decoding() -> None:
    with pytest.raises(ConfigError, match="decode = None says no decoding"):
        DecodingSpec.of(None)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def model() -> Any:
    made = text_model("mixtral")
    made.lm_head.weight.data *= 10  # contrasts change tokens
    return made


def generated(model: Any, text: str, **given: Any) -> Tensor:
    ids_BS, mask_BS = padded_ids()
    return DecodingSpec.of(text).generate(
        model, input_ids=ids_BS, attention_mask=mask_BS, max_new_tokens=12, eos_token_id=None, **given
    )


def test_generates_as_its_parts_would(model: Any) -> None:
    ids_BS, mask_BS = padded_ids()
    options = {"attention_mask": mask_BS, **GREEDY}
    plain = model.generate(ids_BS, **options)
    assert torch.equal(generated(model, "greedy"), plain)
    contrasted = SelfContrast(beta=0.9).generate(model, ids_BS, **options)
    assert not torch.equal(contrasted, plain)
    assert torch.equal(generated(model, "self-contrast beta=0.9"), contrasted)
    with moesaic.override_routing(model, "k=1"):
        other = model.generate(ids_BS, **options)
    assert not torch.equal(other, plain)
    assert torch.equal(generated(model, "greedy override=k=1"), other)
    beams = model.generate(ids_BS, **options, num_beams=3)
    assert torch.equal(generated(model, "beam num_beams=3"), beams)
    assert torch.equal(generated(model, "greedy"), plain)  # nothing stays behind


def test_sampling_is_what_it_says_and_nothing_else(model: Any) -> None:
    """Whatever the model's own generation config has."""
    ids_BS, mask_BS = padded_ids()
    torch.manual_seed(1)
    given: dict[str, Any] = {**GREEDY, "do_sample": True, "temperature": 2.0, "top_k": 0, "attention_mask": mask_BS}
    wanted = model.generate(ids_BS, **given)
    greedy = generated(model, "greedy")
    config: Any = model.generation_config
    model.generation_config = GenerationConfig(do_sample=True, top_k=1, top_p=0.1, min_p=0.9, pad_token_id=0)
    try:
        torch.manual_seed(1)
        assert torch.equal(generated(model, "sample temperature=2"), wanted)
        assert torch.equal(generated(model, "greedy"), greedy)
    finally:
        model.generation_config = config


def test_what_is_set_twice_is_refused(model: Any) -> None:
    for name, value in (("temperature", 0.5), ("do_sample", True), ("top_k", 3), ("num_beams", 2)):
        with pytest.raises(ConfigError, match=f"{name} = .* is set by the decoding"):
            generated(model, "greedy", **{name: value})


class _Collect:
    """A streamer."""

    def __init__(self) -> None:
        self.tokens: list[int] = []

    def put(self, value: Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.tokens.append(-1)


@pytest.mark.parametrize("text", ["greedy", "self-contrast beta=0.9"])
def test_streams(model: Any, text: str) -> None:
    streamer = _Collect()
    found = DecodingSpec.of(text).generate(
        model, torch.tensor([[5, 6, 7]]), streamer=streamer, max_new_tokens=5, eos_token_id=None
    )
    assert streamer.tokens == [*found[0].tolist(), -1]


@pytest.fixture(scope="module")
def drawn(model: Any) -> Any:
    tokenizer = character_tokenizer()

    def draw(text: str, prompts: list[str], batch_size: int) -> list[tuple[int, ...]]:
        sampler = Sampler(
            model, tokenizer, SpecDecoding(DecodingSpec.of(text)), max_new_tokens=8, batch_size=batch_size, seed=3
        )
        return [sample.ids for sample in sampler.draw([(prompt, number) for prompt in prompts for number in (0, 1)])]

    return draw


@pytest.mark.parametrize("text", ["sample temperature=0.9", "self-contrast alpha=1e-20 beta=0.9 temperature=20"])
def test_rows_sample_alike_in_any_batch(drawn: Any, text: str) -> None:
    prompts = ["2+3=", "12+7=", "a b"]
    alone = drawn(text, prompts, 1)
    assert drawn(text, prompts, 6) == alone
    assert alone[0] != alone[1]  # samples differ
    assert drawn(text, prompts[::-1], 4) == [*alone[4:], *alone[2:4], *alone[:2]]


def test_decodings_for_votes_have_strategy_and_routing(model: Any, drawn: Any) -> None:
    prompts = ["2+3=", "a b"]
    plain, contrasted, routed = (
        drawn(text, prompts, 4) for text in ("greedy", "self-contrast beta=0.9", "greedy override=k=1")
    )
    assert plain[0] == plain[1]
    assert len({tuple(plain), tuple(contrasted), tuple(routed)}) == 3
    assert SpecDecoding(DecodingSpec.of("self-contrast")).repeats
    assert not SpecDecoding(DecodingSpec.of("self-contrast temperature=0.5")).repeats


@pytest.mark.parametrize(
    ("text", "passes"), [("greedy", 1), ("self-contrast", 2), ("self-contrast plan=two_passes", 2)]
)
def test_positions_are_counted(model: Any, text: str, passes: int) -> None:
    with count_positions(model, model) as counted:
        generated(model, text)
    assert counted.count == passes * 3 * (9 + 12 - 1)
    generated(model, "greedy")
    assert counted.count == passes * 3 * (9 + 12 - 1)


def test_choices_are_scored_by_the_contrast(model: Any) -> None:
    """Of a strategy with the mask left out; the model's own without one."""
    inputs = {"input_ids": padded_ids()[0][1:2], "use_cache": False}
    amateur = text_model("llama")
    amateur_BSV = amateur(**inputs).logits
    with torch.no_grad():
        own_BSV = model(**inputs).logits
        with moesaic.override_routing(model, "k=3"):
            strong_BSV = model(**inputs).logits
        with moesaic.override_routing(model, "k=3"), moesaic.override_routing(model, "rank=2"):
            weak_BSV = model(**inputs).logits

        def check(spec: DecodingSpec, expected_BSV: Tensor) -> None:
            found_BSV = spec.logits(model, {**inputs, "logits_to_keep": 4})
            torch.testing.assert_close(
                found_BSV.log_softmax(-1), expected_BSV[:, -4:].log_softmax(-1), atol=1e-4, rtol=1e-4
            )

        check(DecodingSpec.of("sample"), own_BSV)
        check(DecodingSpec.of("greedy override=k=3"), strong_BSV)
        contrasted = DecodingSpec.of("self-contrast override=k=3 beta=0.5 strong_temperature=2 weak_temperature=4")
        check(contrasted, 1.5 * strong_BSV / 2 - 0.5 * weak_BSV / 4)
        check(DecodingSpec(strategy=ContrastiveDecoding(amateur=amateur, beta=2.0)), 3 * own_BSV - 2 * amateur_BSV)
        difference_BSV = own_BSV.log_softmax(-1) - (amateur_BSV / 0.5).log_softmax(-1)
        expert = ContrastiveDecoding(amateur=amateur, beta=None, amateur_temperature=0.5)
        check(DecodingSpec(strategy=expert), difference_BSV)
        assert DecodingSpec(strategy=expert).companions == (amateur,)
        with pytest.raises(ConfigError, match="decode = 'early_exit' does not score given texts"):
            DecodingSpec.of("dola").logits(model, inputs)
