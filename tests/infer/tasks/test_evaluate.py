"""Evaluation: likelihoods as a plain loop has them, answers that are found, files that are gone on with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.hf.test_lm_eval import COLOURS
from tests.infer.consistency.text_models import Fixed, character_tokenizer, text_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from moesaic.errors import ConfigError, DataError
from moesaic.infer.consistency import Generate
from moesaic.infer.tasks import ChoiceItem, GenerateItem, ResultsFile, Task, evaluate_task, read_results
from moesaic.infer.tasks.choice import tokenised

TOKENIZER = character_tokenizer()
PROMPTS = ["the sky is", "grass is always", "a", "what colour has a fire engine?"]
LENGTHS = ("none", "tokens", "characters", "bytes")


def colours(length: str = "none") -> Task:
    items = [
        ChoiceItem.from_dict({"prompt": p, "choices": [f" {c}" for c in COLOURS], "answer": n % 3, "length": length})
        for n, p in enumerate(PROMPTS)
    ]
    return Task("colours", {str(n): item for n, item in enumerate(items)})


def word_tokenizer(*, bos: bool) -> PreTrainedTokenizerFast:
    """Byte-level BPE, whose tokens have their space in front."""
    raw = Tokenizer(models.BPE(unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=64, special_tokens=["<pad>", "<s>", "</s>", "<unk>"], show_progress=False)
    raw.train_from_iterator([f"the sky is {colour}" for colour in COLOURS], trainer)
    if bos:
        raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("name", ["own", "mixtral", "qwen3_moe"])
@pytest.mark.parametrize("length", LENGTHS)
def test_choices_equal_a_plain_loop(name: str, length: str) -> None:
    model, task = text_model(name), colours(length)
    result = evaluate_task(model, TOKENIZER, task, batch_size=5)
    for item, row in zip(task.items.values(), result.rows, strict=True):
        assert isinstance(item, ChoiceItem)
        scores = []
        for choice, found in zip(item.choices, row["log_likelihoods"], strict=True):
            ids = torch.tensor([TOKENIZER(item.prompt + choice).input_ids])
            with torch.no_grad():
                log_p_SV = model(input_ids=ids).logits[0].log_softmax(-1)
            places = range(len(item.prompt), ids.shape[1])
            plain = sum(log_p_SV[place - 1, ids[0, place]].item() for place in places)
            assert found == pytest.approx(plain, abs=1e-4)
            scores.append(plain / (1 if length == "none" else len(choice)))
        assert row["predicted"] == max(range(3), key=scores.__getitem__)
        assert row["correct"] == (row["predicted"] == item.right)
    assert result.accuracy.correct == sum(result.correct.values())
    # Each choice reads its prompt.
    assert result.usage.prompt_tokens == 3 * sum(map(len, PROMPTS))
    assert result.usage.scored_tokens == len(PROMPTS) * sum(1 + len(colour) for colour in COLOURS)


@pytest.mark.parametrize("bos", [True, False])
def test_scoring_starts_where_tokens_differ(bos: bool) -> None:
    tokenizer = word_tokenizer(bos=bos)

    def split(prompt: str, *choices: str) -> tuple[list[list[str]], set[int]]:
        rows = tokenised(tokenizer, ChoiceItem.from_dict({"prompt": prompt, "choices": choices, "answer": 0}))
        for row, choice in zip(rows, choices, strict=True):
            assert tokenizer.decode(row.ids, skip_special_tokens=True) == prompt + choice
        return [tokenizer.convert_ids_to_tokens(list(row.ids[row.start :])) for row in rows], {
            row.start for row in rows
        }

    assert split("the sky is", " red", " blue") == split("the sky is", " red", " blue")
    parts, starts = split("the sky is", " red", " blue")
    assert ["".join(part) for part in parts] == ["Ġred", "Ġblue"]
    assert len(starts) == 1
    # The space at the end of the prompt is part of the first token of a choice.
    spaced, same = split("the sky is ", "red", "blue")
    assert (spaced, same) == (parts, starts)
    # Nothing to go by: a choice is the start of a document.
    alone, starts = split("", "red", "blue")
    assert ["".join(part) for part in alone] == ["red", "blue"]
    assert starts == {1}


def sums(**options: Any) -> Task:
    values = {"preset": "last_number", "max_new_tokens": 9, **options}
    items = [GenerateItem.from_dict({"prompt": f"{n}+{n}=", "answer": 2 * n, **values}) for n in range(1, 4)]
    return Task("sums", {str(n): item for n, item in enumerate(items)})


TEXTS = {"1+1=": ["2", "3", "2.0", "2"], "2+2=": ["x", "5", "5", "4"], "3+3=": ["x", "?", "y", "z"]}


def test_a_vote_over_generated_answers() -> None:
    result = evaluate_task(
        text_model("llama"), TOKENIZER, sums(), decoding=Fixed(TOKENIZER, TEXTS), samples=4, batch_size=3
    )
    assert result.correct == {"0": True, "1": False, "2": False}
    assert [row["predicted"] for row in result.rows] == ["2", "5", None]
    assert result.unanswered == 1
    assert result.rows[2]["abstentions"] == 4
    # The last sample could not change the vote, and was not drawn.
    assert result.rows[1]["shares"] == {"5": 1.0}
    assert [sample["answer"] for sample in result.rows[1]["samples"]] == [None, "5", "5"]
    drawn = [sample for row in result.rows for sample in row["samples"]]
    assert result.usage.generated_tokens == sum(sample["tokens"] for sample in drawn)
    assert result.usage.prompt_tokens == 4 * len(drawn)


@pytest.mark.parametrize("rule", ["weighted", "best"])
def test_other_rules_score_samples(rule: Any) -> None:
    sampling = Generate(do_sample=True)
    result = evaluate_task(text_model("own"), TOKENIZER, sums(), decoding=sampling, samples=3, vote=rule, batch_size=4)
    for row in result.rows:
        scores = [sample["score"] for sample in row["samples"]]
        assert len(scores) <= 3
        if rule == "best":
            assert row["predicted"] == row["samples"][scores.index(max(scores))]["answer"]
        assert row["scored_tokens"] == row["generated_tokens"]


def test_batches_do_not_matter() -> None:
    def answers(batch_size: int) -> list[Any]:
        decoding = Generate(do_sample=True, temperature=0.5)
        result = evaluate_task(
            text_model("mixtral"),
            TOKENIZER,
            sums(preset="whole", compare="exact"),
            decoding=decoding,
            batch_size=batch_size,
        )
        return [row["samples"] for row in result.rows]

    assert answers(1) == answers(3)


def test_results_are_gone_on_with(tmp_path: Path) -> None:
    path, task, model = tmp_path / "deep" / "results.jsonl", colours(), text_model("llama")
    whole = evaluate_task(model, TOKENIZER, task, batch_size=2)
    evaluate_task(model, TOKENIZER, task, limit=2, results=ResultsFile(path, {"seed": 0}))
    with path.open("a", encoding="utf-8") as file:
        file.write('{"task": "colours", "id": "2", "ite')  # killed while it wrote
    done: list[int] = []
    again = evaluate_task(model, TOKENIZER, task, results=ResultsFile(path, {"seed": 0}), progress=done.append)
    assert done == [2, 2]
    rows = read_results(path)
    assert [row["id"] for row in rows] == ["0", "1", "2", "3"]
    assert again.correct == whole.correct == {row["id"]: row["correct"] for row in rows}
    assert again.usage.prompt_tokens == whole.usage.prompt_tokens
    assert again.compare(rows).p_value == 1.0


def test_results_of_something_else_are_refused(tmp_path: Path) -> None:
    path, model = tmp_path / "results.jsonl", text_model("llama")
    result = evaluate_task(model, TOKENIZER, colours(), results=ResultsFile(path, {"seed": 0}))
    with pytest.raises(DataError, match="another model or other settings"):
        ResultsFile(path, {"seed": 1})
    with pytest.raises(DataError, match=r"item '0' .*before the task changed"):
        evaluate_task(model, TOKENIZER, colours("bytes"), results=ResultsFile(path, {"seed": 0}))
    with pytest.raises(DataError, match=r"item '0' .*had another content"):
        evaluate_task(model, TOKENIZER, colours("bytes")).compare(result.rows)
    with pytest.raises(DataError, match=r"item '2' .*is not in"):
        result.compare(result.rows[:2])
    path.write_text(json.dumps({"no": "result"}) + "\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"results\.jsonl, line 1: is not a result"):
        ResultsFile(path, {"seed": 0})
    with pytest.raises(DataError, match="is not a file"):
        read_results(tmp_path / "none.jsonl")


def test_bad_input_is_named() -> None:
    model, unpadded = text_model("llama"), character_tokenizer()
    unpadded.pad_token = None
    with pytest.raises(ConfigError, match=r"tokenizer\.pad_token"):
        evaluate_task(model, unpadded, sums())
    assert evaluate_task(model, unpadded, colours()).accuracy.items == 4
    with pytest.raises(ConfigError, match="samples = 2"):
        evaluate_task(model, TOKENIZER, sums(), samples=2)
    with pytest.raises(ConfigError, match="batch_size = 0"):
        evaluate_task(model, TOKENIZER, sums(), batch_size=0)
