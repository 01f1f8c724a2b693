"""Batches for an objective: every token once, the right labels, the same rows for any number of processes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.data.builders import store_of
from transformers import PreTrainedTokenizerFast

from moesaic.data import (
    UL2,
    Batch,
    CausalLM,
    MixedObjective,
    PackedSequences,
    PrefixLM,
    SpanCorruption,
    StagedObjective,
    TrainingObjective,
    train_tokenizer,
)
from moesaic.data.objective.check import sentinels_needed
from moesaic.errors import ConfigError

LENGTH, ROWS = 64, 6
# Ids of text in these tests; the tokenizer's own end below.
TEXT = range(20, 250)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    modes = ("[NLU]", "[NLG]", "[S2S]")
    extra = (*modes, *(f"<extra_id_{number}>" for number in range(8)))
    return train_tokenizer(["the quick brown fox jumps over the lazy dog. " * 3], 290, extra)


def packed(length: int = LENGTH, rows: int = ROWS, **options: Any) -> Batch:
    """Rows of text without repeats within a row; the documents of the two domains take turns."""
    rng = np.random.default_rng(1)
    halves = [np.split(rng.permutation(np.array(TEXT))[:length], 2) for _ in range(rows)]
    documents = [half.tolist() for row in halves for half in row]
    store = store_of(documents, [number % 2 for number in range(2 * rows)])
    return PackedSequences(store, length, **options).batch(range(rows))


def one(*denoisers: SpanCorruption | PrefixLM) -> UL2:
    return UL2(denoisers=denoisers)


def made(config: Any, tokenizer: PreTrainedTokenizerFast, batch: Batch | None = None, **place: int) -> Batch:
    batch = packed() if batch is None else batch
    objective = TrainingObjective(config, tokenizer, batch["input_ids"].shape[1], seed=3)
    return objective.batch(batch, **{"step": 0, "steps": 10, **place})


def special(tokenizer: PreTrainedTokenizerFast) -> set[int]:
    return set(tokenizer.convert_tokens_to_ids(tokenizer.all_special_tokens))  # type: ignore[arg-type]


def test_causal_lm_leaves_batches_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    batch = packed()
    assert made(CausalLM(), tokenizer, batch) is batch


@given(step=st.integers(0, 1000), first_row=st.integers(0, 50))
@settings(max_examples=25)
def test_rows_hold_a_stretch_of_the_text_once(tokenizer: PreTrainedTokenizerFast, step: int, first_row: int) -> None:
    batch, marks = packed(), special(tokenizer)
    modes = dict(zip(tokenizer.convert_tokens_to_ids(["[NLU]", "[NLG]", "[S2S]"]), ("NLU", "NLG", "S2S"), strict=True))
    found = made(UL2(), tokenizer, batch, step=step, first_row=first_row, steps=2000)
    for row in range(ROWS):
        ids, text = found["input_ids"][row], batch["input_ids"][row].tolist()
        real, labels = found["attention_mask"][row].bool(), found["labels"][row]
        count = int(real.sum())
        assert real[:count].all()
        assert (ids[count:] == tokenizer.pad_token_id).all()
        assert (labels[~real] == -100).all()
        mode = modes[int(ids[0])]
        said = [token for token in ids[1:count].tolist() if token not in marks]
        # A stretch of the text, its spans moved to the end; half of it and more for the denoisers that hide much.
        start = min(text.index(token) for token in said)
        assert sorted(said) == sorted(text[start : start + len(said)])
        predicted = labels != -100
        assert torch.equal(labels[predicted], ids[predicted])
        first = int(predicted.nonzero()[0])
        assert predicted[first:count].all()
        assert not predicted[:first].any()
        if mode == "S2S":
            assert ids[1:count].tolist() == text[: LENGTH - 1]
            assert count == LENGTH
        else:
            assert ids[first] == tokenizer.convert_tokens_to_ids("<extra_id_0>")
            assert ids[first - 1] == ids[count - 1] == tokenizer.eos_token_id


def test_ids_of_documents_and_domains_follow_their_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    batch = packed(domains_are="modality")
    found = made(UL2(), tokenizer, batch)
    marks = special(tokenizer)
    for row in range(ROWS):
        text = batch["input_ids"][row].tolist()
        for place, token in enumerate(found["input_ids"][row].tolist()):
            if not found["attention_mask"][row, place]:
                assert found["domain_ids"][row, place] == found["document_ids"][row, place] == -1
            elif token not in marks:
                source = text.index(token)
                for name in ("document_ids", "domain_ids", "modality_ids"):
                    assert found[name][row, place] == batch[name][row, source]
    assert set(found["modality_ids"].unique().tolist()) == {0, 1}


def test_tasks_stay_those_of_the_rows(tokenizer: PreTrainedTokenizerFast) -> None:
    batch = packed(domains_are="task", rows=4)
    assert torch.equal(made(UL2(), tokenizer, batch)["task_ids"], batch["task_ids"])


def test_processes_make_the_rows_of_one(tokenizer: PreTrainedTokenizerFast) -> None:
    batch = packed()
    whole = made(UL2(), tokenizer, batch, step=4, micro_batch=1)
    for first in (0, 3):
        part = Batch(**{name: value[first : first + 3] for name, value in batch.items()})
        found = made(UL2(), tokenizer, part, step=4, micro_batch=1, first_row=first)
        for name, value in found.items():
            assert torch.equal(value, whole[name][first : first + 3]), name


def test_every_step_micro_batch_and_row_is_another_draw(tokenizer: PreTrainedTokenizerFast) -> None:
    batch = packed()
    rows = Batch(**{name: value[:1].expand(4, *value.shape[1:]) for name, value in batch.items()})
    same = made(UL2(), tokenizer, rows)
    assert len({tuple(row) for row in same["input_ids"].tolist()}) > 1
    assert torch.equal(made(UL2(), tokenizer, rows)["input_ids"], same["input_ids"])
    for place in ({"step": 1}, {"micro_batch": 1}, {"first_row": 4}):
        assert not torch.equal(made(UL2(), tokenizer, rows, **place)["input_ids"], same["input_ids"])


def test_denoisers_come_as_often_as_their_shares(tokenizer: PreTrainedTokenizerFast) -> None:
    batch = packed()
    rows = Batch(**{name: value[:1].expand(3000, *value.shape[1:]) for name, value in batch.items()})
    first = made(UL2(), tokenizer, rows)["input_ids"][:, 0]
    for name, share in {"[NLU]": 0.2, "[NLG]": 0.3, "[S2S]": 0.5}.items():
        found = float((first == tokenizer.convert_tokens_to_ids(name)).float().mean())
        assert found == pytest.approx(share, abs=4 * (share * (1 - share) / 3000) ** 0.5)


def test_prefix_lm_hides_half_in_the_mean(tokenizer: PreTrainedTokenizerFast) -> None:
    batch = packed()
    rows = Batch(**{name: value[:1].expand(2000, *value.shape[1:]) for name, value in batch.items()})
    found = made(one(PrefixLM(share=1)), tokenizer, rows)
    assert torch.equal(found["input_ids"], rows["input_ids"])
    predicted = (found["labels"] != -100).sum(1)
    assert (int(predicted.min()), int(predicted.max())) == (1, LENGTH - 1)
    assert float(predicted.float().mean()) == pytest.approx(LENGTH / 2, rel=0.04)


def test_mixed_objectives_come_as_often_as_their_shares(tokenizer: PreTrainedTokenizerFast) -> None:
    parts = [{"share": 3, "objective": {"type": "causal_lm"}}, {"share": 1, "objective": {"type": "ul2"}}]
    config = MixedObjective.from_dict({"parts": parts})
    batch = packed()
    rows = Batch(**{name: value[:1].expand(2000, *value.shape[1:]) for name, value in batch.items()})
    found = made(config, tokenizer, rows)
    causal = (found["labels"] == rows["input_ids"]).all(1)
    assert float(causal.float().mean()) == pytest.approx(0.75, abs=0.04)
    assert torch.equal(found["input_ids"][causal], rows["input_ids"][causal])
    assert found["attention_mask"][causal].all()


@pytest.mark.parametrize("until", [{"until": 0.5}, {"until_step": 5}])
def test_stages_change_at_their_step(tokenizer: PreTrainedTokenizerFast, until: dict[str, Any]) -> None:
    stages = [{"objective": {"type": "ul2"}, **until}, {"objective": {"type": "causal_lm"}}]
    objective = TrainingObjective(StagedObjective.from_dict({"stages": stages}), tokenizer, LENGTH)
    assert [objective.at(step, 10).type for step in range(10)] == ["ul2"] * 5 + ["causal_lm"] * 5
    assert [objective.begins(step, 10) for step in range(10)] == [None] * 5 + ["causal_lm"] + [None] * 4
    batch = packed()
    assert objective.batch(batch, step=5, steps=10) is batch


def test_reserved_ids_come_after_those_of_the_tokenizer(tokenizer: PreTrainedTokenizerFast) -> None:
    plain = train_tokenizer(["the quick brown fox. " * 3], 280)
    config = UL2(reserved_from=300)
    objective = TrainingObjective(config, plain, LENGTH)
    needed = sentinels_needed(config, LENGTH)
    assert objective.vocabulary == 300 + 3 + needed
    found = objective.batch(packed(), step=0, steps=1)["input_ids"]
    assert set(found[:, 0].tolist()) <= {300, 301, 302}
    assert 303 in found
    assert int(found.max()) < objective.vocabulary
    with pytest.raises(ConfigError, match=r"objective.reserved_from = 100 is an id of the tokenizer, whose ids end at"):
        TrainingObjective(UL2(reserved_from=100), plain, LENGTH)


def test_a_tokenizer_without_the_tokens_is_refused() -> None:
    plain = train_tokenizer(["the quick brown fox. " * 3], 280)
    with pytest.raises(
        ConfigError, match=r"data.objective = 'ul2' needs 7 sentinels and 3 mode tokens.*no <extra_id_0>"
    ):
        TrainingObjective(UL2(), plain, LENGTH)
    stages = {"stages": [{"objective": {"type": "ul2"}, "until": 0.5}, {"objective": {"type": "causal_lm"}}]}
    with pytest.raises(ConfigError, match=r"data.objective.stages.0.objective = 'ul2'"):
        TrainingObjective(StagedObjective.from_dict(stages), plain, LENGTH)
