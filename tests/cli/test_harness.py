"""`moesaic eval --tasks`: tasks of lm-evaluation-harness, by any decoding."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tests.cli.conftest import Cli
from tests.infer.consistency.text_models import character_tokenizer, text_model

from moesaic.infer.consistency import Sampler, SpecDecoding
from moesaic.infer.decode import DecodingSpec, override_routing


def write_task(folder: Path, name: str, rows: list[dict[str, Any]], **fields: Any) -> None:
    (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}},
        "test_split": "test",
        "doc_to_text": "{{question}}",
        **fields,
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows = [{"question": f"{n} plus {n} is", "choices": [f" {2 * n}", " x"], "answer": 0} for n in range(4)]
    write_task(
        tmp_path,
        "tiny_choices",
        rows,
        output_type="multiple_choice",
        doc_to_choice="{{choices}}",
        doc_to_target="answer",
        metric_list=[{"metric": "acc"}],
    )
    write_task(
        tmp_path,
        "tiny_texts",
        rows[:2],
        output_type="generate_until",
        doc_to_target="{{answer}}",
        generation_kwargs={"until": ["\n"], "max_gen_toks": 4, "do_sample": True, "temperature": 2.0},
        metric_list=[{"metric": "exact_match"}],
    )
    return tmp_path


def test_tasks_of_lm_eval(cli: Cli, trained: Path, folder: Path) -> None:
    ended = cli("eval", trained, "--tasks", "tiny_choices", "--tasks-folder", folder, "--json")
    assert ended.code == 0, ended.err
    accuracy = json.loads(ended.out)["tasks"]["tiny_choices"]["acc,none"]
    assert accuracy in {0.0, 0.25, 0.5, 0.75, 1.0}


def test_tasks_of_lm_eval_by_decoding(cli: Cli, trained: Path, folder: Path) -> None:
    options = ("--tasks-folder", folder, "--decode", "self-contrast beta=0.5", "--temperature", "0.5", "--json")
    ended = cli("eval", trained, "--tasks", "tiny_choices,tiny_texts", *options)
    assert ended.code == 0, ended.err
    report = json.loads(ended.out)
    assert report["decoding"] == "self-contrast beta=0.5 temperature=0.5"
    assert set(report["tasks"]) == {"tiny_choices", "tiny_texts"}
    refused = cli("eval", trained, "--tasks", "tiny_choices", *options)
    assert refused.code == 2
    assert "decode.temperature = 0.5 is for generated answers, and all are multiple choice" in refused.err
    refused = cli(
        "eval", trained, "--tasks", "tiny_texts", "--tasks-folder", folder, "--decode", "greedy override=rank=9"
    )
    assert refused.code == 2
    assert "rank = 9 is more than the 8 experts" in refused.err


@pytest.fixture(scope="module")
def model() -> Any:
    return text_model("mixtral")


TOKENIZER = character_tokenizer()
PROMPTS = ["12+3=", "a b c d", "7*6="]


def language_model(model: Any, text: str) -> Any:
    from moesaic.cli.harness import DecodingLM

    return DecodingLM(DecodingSpec.of(text), 5, pretrained=model, tokenizer=character_tokenizer(), batch_size=2)


def request(kind: Any, *arguments: Any) -> Any:
    from lm_eval.api.instance import Instance

    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


@pytest.mark.parametrize(
    "text",
    ["greedy override=k=1", "self-contrast beta=0.9 alpha=1e-9", "self-contrast alpha=1e-9 temperature=9", "beam"],
)
def test_texts_are_those_of_the_decoding(model: Any, text: str) -> None:
    """Whatever the task says of sampling."""
    given = {"until": ["5"], "max_gen_toks": 6, "do_sample": True, "temperature": 3.0, "top_k": 2, "num_beams": 2}
    requests = [request("generate_until", prompt, given) for prompt in [*PROMPTS, PROMPTS[0]]]
    found = language_model(model, text).generate_until(requests, disable_tqdm=True)
    decoding = SpecDecoding(DecodingSpec.of(text))
    sampler = Sampler(model, TOKENIZER, decoding, max_new_tokens=6, stop=["5"], batch_size=4, seed=5)
    numbered = [(prompt, 0) for prompt in PROMPTS] + [(PROMPTS[0], 1)]
    assert found == [sample.text for sample in sampler.draw(numbered)]


def test_likelihoods_are_those_of_the_decoding(model: Any) -> None:
    requests = [request("loglikelihood", prompt, answer) for prompt in PROMPTS for answer in (" 15", "x")]

    def by_hand(weak: str, beta: float) -> list[float]:
        sums = []
        for asked in requests:
            prompt, answer = (TOKENIZER(part, return_tensors="pt").input_ids for part in asked.args)
            ids_1S = torch.cat([prompt, answer], 1)
            with torch.no_grad():
                strong_SV = model(ids_1S).logits[0, :-1]
                with override_routing(model, weak):
                    weak_SV = model(ids_1S).logits[0, :-1]
            log_p_SV = ((1 + beta) * strong_SV - beta * weak_SV).log_softmax(-1)
            sums.append(log_p_SV.gather(1, ids_1S[0, 1:, None])[-answer.shape[1] :].sum().item())
        return sums

    for text, weak, beta in [
        ("self-contrast beta=0.5 weak=rank=3", "rank=3", 0.5),
        ("greedy", "k=1", 0.0),
        ("greedy override=k=1", "k=1", -1.0),
    ]:
        found = language_model(model, text).loglikelihood(requests, disable_tqdm=True)
        assert [total for total, _ in found] == pytest.approx(by_hand(weak, beta), abs=1e-4)
