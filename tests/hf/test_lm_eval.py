"""lm-evaluation-harness runs on a moesaic model through its own HF wrapper, with a local task and no network."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tests.hf.tiny import VOCABULARY, copy_of
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from moesaic import MoesaicForCausalLM

COLOURS = ["red", "green", "blue"]
TASK = """
task: colours
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "the {{{{thing}}}} is"
doc_to_target: answer
doc_to_choice: [red, green, blue]
metric_list:
  - metric: acc
"""


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    raw = Tokenizer(models.BPE(unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, show_progress=False)
    raw.train_from_iterator([f"the {thing} is {colour}" for thing in ("sky", "grass") for colour in COLOURS], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def test_multiple_choice_task(
    llama: MoesaicForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    documents = [{"thing": "sky", "answer": 2}, {"thing": "grass", "answer": 1}, {"thing": "fire", "answer": 0}]
    data = tmp_path / "colours.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents))
    (tmp_path / "colours.yaml").write_text(TASK.format(data=data))

    model = copy_of(llama)
    wrapper = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, device="cpu")
    results = simple_evaluate(
        wrapper,
        tasks=["colours"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
        log_samples=True,
    )
    assert results is not None
    samples = results["samples"]["colours"]
    assert len(samples) == len(documents)
    right = 0
    for sample in samples:
        reported = [response[0][0] for response in sample["resps"]]
        expected = [log_likelihood(model, tokenizer, f"the {sample['doc']['thing']} is", f" {c}") for c in COLOURS]
        assert reported == pytest.approx(expected, abs=1e-3)
        right += max(range(3), key=expected.__getitem__) == sample["doc"]["answer"]
    assert results["results"]["colours"]["acc,none"] == pytest.approx(right / len(documents))


@torch.no_grad()
def log_likelihood(
    model: MoesaicForCausalLM, tokenizer: PreTrainedTokenizerFast, context: str, continuation: str
) -> float:
    start = len(tokenizer(context).input_ids)
    ids = torch.tensor([tokenizer(context + continuation).input_ids])
    scores = model(ids).logits[0, start - 1 : -1].log_softmax(-1)
    return scores.gather(-1, ids[0, start:, None]).sum().item()
