"""The `objective` of a run: the default table, and what does not fit."""

from __future__ import annotations

from typing import Any

import pytest

from moesaic.data import UL2, DataConfig, PrefixLM, SpanCorruption, TrainBPE, train_tokenizer
from moesaic.data.objective.check import check_stages, sentinels_needed
from moesaic.data.tokenizer import encode
from moesaic.errors import ConfigError

TOKENIZER = {"type": "train_bpe", "vocab_size": 512, "sentinels": 40}


def data(**values: Any) -> DataConfig:
    return DataConfig.from_dict({"tokenizer": TOKENIZER, "objective": {"type": "ul2"}, **values}, where="data")


def test_the_default_is_openmoes_table() -> None:
    found = [
        (denoiser.mean_span, denoiser.noise_density, denoiser.share, denoiser.mode)
        for denoiser in UL2().denoisers
        if isinstance(denoiser, SpanCorruption)
    ]
    assert found == [
        (3, 0.15, 0.1, "[NLU]"),
        (8, 0.15, 0.1, "[NLU]"),
        (3, 0.5, 0.1, "[NLG]"),
        (8, 0.5, 0.1, "[NLG]"),
        (64, 0.5, 0.1, "[NLG]"),
    ]
    (prefix,) = [denoiser for denoiser in UL2().denoisers if isinstance(denoiser, PrefixLM)]
    assert (prefix.share, prefix.mode) == (0.5, "[S2S]")
    assert UL2().modes == ("[NLU]", "[NLG]", "[S2S]")
    # The widest denoiser has a span for every six tokens read; OpenMoE's tokenizer has 300 extra ids.
    assert sentinels_needed(UL2(), 2048) == 255 < 300


def test_configs_round_trip() -> None:
    parts = [{"share": 1, "objective": {"type": "ul2"}}, {"share": 1, "objective": {"type": "causal_lm"}}]
    stages = [{"objective": {"type": "mixed", "parts": parts}, "until": 0.5}, {"objective": {"type": "causal_lm"}}]
    config = data(objective={"type": "stages", "stages": stages})
    assert DataConfig.from_dict(config.to_dict()) == config


def test_the_tokenizer_gets_tokens_that_no_text_becomes() -> None:
    config = TrainBPE(vocab_size=290, sentinels=4)
    tokenizer = train_tokenizer(["the quick brown fox. " * 5], config.vocab_size, config.extra_tokens)
    assert tokenizer.convert_tokens_to_ids("<extra_id_3>") in tokenizer.all_special_ids
    assert len(encode(tokenizer, ["[NLU] <extra_id_0>"])[0]) > 2
    assert tokenizer.decode(encode(tokenizer, ["[NLU] <extra_id_0>"])[0]) == "[NLU] <extra_id_0>"
    plain = train_tokenizer(["the quick brown fox. " * 5], 290)
    assert "[NLU]" not in plain.get_vocab()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sequence_length": 4}, r"data.sequence_length = 4 is too short for objective.denoisers"),
        (
            {"sequence_length": 2048},
            r"data.tokenizer.sentinels = 40 is fewer than the 255 that the objective needs in sequences of 2048 tokens",
        ),
        ({"isolate_documents": True}, r"data.isolate_documents = True does not go with denoising"),
        (
            {"tokenizer": {**TOKENIZER, "vocab_size": 300}},
            r"data.tokenizer.*vocab_size = 300 has no room for 40 sentinels",
        ),
        ({"objective": {"type": "ul2", "sentinel": "<extra>"}}, r"sentinel = '<extra>' has not one {} for the number"),
        ({"objective": {"type": "ul2", "denoisers": []}}, r"denoisers = \[\]"),
        (
            {"objective": {"type": "stages", "stages": [{"objective": {"type": "ul2"}}] * 2}},
            r"stages.0 = .* ends in another way than the first; give until_step alone",
        ),
        (
            {"objective": {"type": "stages", "stages": [{"objective": {"type": "ul2"}, "until": 0.5}] * 2}},
            r"stages.1.until = 0.5 leaves the rest open",
        ),
        (
            {
                "objective": {
                    "type": "stages",
                    "stages": [
                        {"objective": {"type": "ul2"}, "until": 0.5},
                        {"objective": {"type": "causal_lm"}, "until": 0.4},
                        {"objective": {"type": "ul2"}},
                    ],
                }
            },
            r"stages.1.until = 0.4 is not after the stage before it",
        ),
        ({"objective": {"type": "mlm"}}, r"objective"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        data(**values)


def test_stages_beyond_the_run_are_refused() -> None:
    stages = [{"objective": {"type": "ul2"}, "until_step": 10}, {"objective": {"type": "causal_lm"}}]
    objective = data(objective={"type": "stages", "stages": stages}).objective
    check_stages(objective, 11)
    with pytest.raises(ConfigError, match=r"stages.0.until_step = 10 does not end before the run of 10 steps"):
        check_stages(objective, 10)
