from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.papers.tiny import EXPERIMENT as TINY
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from moesaic.data import DataConfig, ProblemsSource, load_tokenizer, read_documents, train_tokenizer
from moesaic.data.split import is_validation
from moesaic.errors import ConfigError
from moesaic.infer.decode.overrides import override_routing
from moesaic.infer.tasks.statistics import mcnemar
from moesaic.papers import EXPERIMENTS, Reproduction, arms_of, reproduce, write_page
from moesaic.papers.given import parameters_of
from moesaic.papers.scmoe import rank_correlation
from moesaic.papers.scmoe_decodings import (
    AMATEUR,
    CONTRAST,
    DEFAULT,
    DOLA,
    ENSEMBLE,
    GREEDY,
    SEARCH,
    settings,
)
from moesaic.papers.scmoe_options import MeasureOptions, Routed
from moesaic.papers.scmoe_page import PAPER_UNCHOSEN
from moesaic.papers.scmoe_passes import Answered, distances
from moesaic.papers.scmoe_splits import splits_of_run, splits_of_user
from moesaic.trace import record
from moesaic.train import load_model

EXPERIMENT = EXPERIMENTS["scmoe"]
SMALL = [
    "measure.problems=4",
    "measure.dev=2",
    "measure.batch_size=4",
    "measure.max_new_tokens=3",
    "measure.betas=[0.5]",
    "measure.ranks=3",
    "measure.experts=[1, 2]",
    "measure.dynamic=[0.5]",
    "measure.penalties=[0.6]",
    "measure.stronger=[1]",
    "measure.samples=2",
    "measure.voted=2",
    "measure.votes=[1, 2]",
    "measure.compared=3",
    "measure.latency_tokens=2",
    "measure.latency_repeats=1",
    "measure.demonstrations=2",
]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Reproduction:
    return reproduce(EXPERIMENT, "test", tmp_path_factory.mktemp("scmoe"), seeds=(0,), jobs=1, progress=False)


@pytest.fixture(scope="module")
def model(found: Reproduction) -> PreTrainedModel:
    """The trained model, its routers made decided and its head loud, so that passes differ."""
    model = load_model(found.output / "seed-0" / "moe" / "checkpoints" / "step-00000012").eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gate.weight"):
                parameter.normal_(std=2.0)
            elif "experts" in name:
                parameter.normal_(std=0.3)
    return model


def texts(model: PreTrainedModel) -> list[Answered]:
    torch.manual_seed(1)
    lengths = [(5, 3), (9, 4), (7, 1)]
    return [
        Answered(torch.randint(2, 250, (prompt,)).tolist(), torch.randint(2, 250, (answer,)).tolist())
        for prompt, answer in lengths
    ]


def test_everything_is_measured(found: Reproduction):
    moe, fine = (found.results[0][arm] for arm in ("moe", "fine"))
    assert moe.measurements["test_items"] == 8
    assert moe.measurements["dev_items"] == 4
    assert moe.series["numbers"] == [1, 2, 4]
    assert len(moe.series[f"dev.{CONTRAST}"]) == 4 * 2  # ranks 1 to 3 and a random expert, two betas
    assert len(fine.series[f"dev.{CONTRAST}"]) == 3 * 2  # one to three experts
    assert len(moe.series["kl"]) == len(moe.series["unchosen"]) == 3
    for name in ("same.beta_0", "same.alpha_1", "same.weak_is_strong", "same.plans"):
        assert moe.measurements[name] == fine.measurements[name] == 100, name
    assert moe.measurements["unchosen.rank=1.L0"] == 0  # the same hidden states, and the best expert among the best two
    assert moe.measurements["unchosen.rank=3.L0"] == 100
    assert moe.measurements["amateur"] == 0
    assert moe.measurements["kl.amateur"] > 0
    for name in (DOLA, AMATEUR, SEARCH):
        assert moe.measurements[f"latency.{name}"] > 0, name
        assert f"accuracy.{name}" in moe.measurements, name
    assert 0 <= moe.measurements["kl.rank=1"] < math.inf
    assert fine.measurements["kl.k=1"] >= 0
    assert moe.measurements[f"latency.{GREEDY}"] == 1
    for result in (moe, fine):
        for name in (DEFAULT, CONTRAST, ENSEMBLE):
            assert result.measurements[f"gained.{name}"] - result.measurements[f"lost.{name}"] == pytest.approx(
                8 * (result.measurements[f"accuracy.{name}"] - result.measurements[f"accuracy.{GREEDY}"]) / 100
            )


def test_the_page_has_all_findings(found: Reproduction, tmp_path: Path):
    pytest.importorskip("matplotlib")
    text = write_page(found, tmp_path).read_text(encoding="utf-8")
    for section in EXPERIMENT.sections:
        assert f"## {section.title}\n" in text
    figures = re.findall(r"\]\((scmoe-test[\w-]*\.svg)\)", text)
    assert len(figures) == 4
    assert all((tmp_path / figure).read_bytes().startswith(b"<?xml") for figure in figures)
    assert re.search(r"\| `moe` \| self-contrast, setting fixed before \| rank=2, beta 0\.3 \| [\d.]+ \|", text)
    assert re.search(r"\| `moe` \| `rank=2` \| [\d.]+ \|.*\| 5\.05 \| [\d.]+ \| 46\.2 \|", text)
    assert re.search(r"\| `moe` \| \*\*2\*\*, trained \| [\d.]+ \| 61\.8 \|", text)
    assert all(len(line) <= 120 for line in text.splitlines() if not line.startswith("|"))


def test_finished_results_are_kept_until_options_change(found: Reproduction):
    again = reproduce(EXPERIMENT, "test", found.output, seeds=(0,), jobs=1, progress=False)
    assert again.results[0]["moe"].measurements == found.results[0]["moe"].measurements
    moe = found.output / "seed-0" / "moe"
    (moe / "result.json").unlink()
    [kept_answers] = moe.glob("measured-*")
    before = {path.name: path.stat().st_size for path in kept_answers.iterdir()}
    resumed = reproduce(EXPERIMENT, "test", found.output, seeds=(0,), jobs=1, progress=False)
    assert {path.name: path.stat().st_size for path in kept_answers.iterdir()} == before  # nothing was asked again
    assert resumed.results[0]["moe"].series == found.results[0]["moe"].series
    path = found.output / "seed-0" / "fine" / "result.json"
    kept = path.read_text(encoding="utf-8")
    changed = [
        "measure.alpha=0.2",
        *(part for part in SMALL if "demonstrations" not in part),
        "measure.latency_tokens=0",
    ]
    other = reproduce(EXPERIMENT, "test", found.output, seeds=(0,), overrides=changed, jobs=1, progress=False)
    assert other.results[0]["fine"].run["measure"]["alpha"] == 0.2
    assert not any(name.startswith("latency") for name in other.results[0]["fine"].measurements)
    assert other.results[0]["fine"].measurements["loss"] == found.results[0]["fine"].measurements["loss"]
    path.write_text(kept, encoding="utf-8")


def test_distances_are_those_of_two_forward_passes(model: PreTrainedModel):
    tokenizer = load_tokenizer(str(model.name_or_path))
    answered = texts(model)
    measured = distances(model, tokenizer, answered, ("rank=2", "k=2"), batch_size=2)
    assert measured["k=2"].mean_kl == 0  # the trained routing
    assert measured["k=2"].unchosen == 0
    kl, picks, outside = [], 0, 0
    for text in answered:
        ids = torch.tensor([[*text.prompt, *text.answer]])
        where = slice(len(text.prompt) - 1, -1)
        with torch.no_grad(), record(model) as strong_trace:
            strong = model(ids).logits[0, where].double().log_softmax(-1)
        with torch.no_grad(), override_routing(model, "rank=2"), record(model) as weak_trace:
            weak = model(ids).logits[0, where].double().log_softmax(-1)
        kl += (strong.exp() * (strong - weak)).sum(-1).tolist()
        for layer, trace in weak_trace.layers.items():
            for pick, chosen in zip(
                trace.index_TK[where].tolist(), strong_trace.layers[layer].index_TK[where].tolist(), strict=True
            ):
                picks, outside = picks + 1, outside + (pick[0] not in chosen)
    assert measured["rank=2"].tokens == len(kl) == 8
    assert measured["rank=2"].mean_kl == pytest.approx(sum(kl) / len(kl), rel=1e-4)
    assert measured["rank=2"].mean_kl > 1e-3
    assert measured["rank=2"].unchosen == outside / picks
    assert sum(measured["rank=2"].picks.values()) == picks == 16


def test_tokens_of_expressions_are_set_apart(model: PreTrainedModel):
    tokenizer = load_tokenizer(str(model.name_or_path))
    ids = tokenizer("4+a")["input_ids"]
    prompt = tokenizer("Q")["input_ids"]
    found = distances(model, tokenizer, [Answered(prompt, ids)], ("rank=3",), batch_size=1)["rank=3"]  # pyright: ignore[reportArgumentType]
    assert (found.tokens, found.expressions) == (3, 2)
    assert found.mean_kl * 3 == pytest.approx(found.mean_kl_expression * 2 + found.mean_kl_other)


def test_the_same_model_as_amateur_is_at_no_distance(model: PreTrainedModel):
    tokenizer = load_tokenizer(str(model.name_or_path))
    found = distances(model, tokenizer, texts(model), ("rank=1",), batch_size=3, amateur=model)
    assert found["amateur"].mean_kl == pytest.approx(0, abs=1e-9)
    assert math.isnan(found["amateur"].unchosen)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (PAPER_UNCHOSEN, 1.0),
        ((3.0, 2.0, 1.0), -1.0),
        ((0.04, 1.25, 1.73, 1.82, 1.68, 1.84, 2.12, 2.52), 1 - 6 * 6 / (8 * 63)),
    ],
)
def test_rank_correlation(values: tuple[float, ...], expected: float):
    assert rank_correlation(values) == pytest.approx(expected)


def test_mcnemar_is_the_binomial_test():
    assert mcnemar(0, 0) == mcnemar(3, 3) == 1
    assert mcnemar(5, 0) == mcnemar(0, 5) == 2 / 32
    assert mcnemar(8, 2) == pytest.approx(0.109375)


def test_grids_fit_the_model():
    options = MeasureOptions()
    mixtral, deepseek = Routed(8, 2), Routed(64, 6)
    assert mixtral.weak(options) == (*(f"rank={rank}" for rank in range(1, 9)), "random=1")
    assert deepseek.weak(options) == ("k=1", "k=2", "k=3")
    assert deepseek.numbers(options) == tuple(range(1, 9))
    assert Routed(64, 12).numbers(options) == (*range(1, 9), 12)
    assert Routed(4, 4).stronger(options) == ()
    grids = settings(mixtral, options)
    assert [setting.label for setting in grids[DEFAULT]] == ["rank=2, beta 0.3"]
    assert [setting.label for setting in settings(deepseek, options)[DEFAULT]] == ["k=1, beta 0.5"]
    assert len(grids[CONTRAST]) == 9 * 3
    assert all(setting.strategy.alpha == 0.1 for setting in grids[CONTRAST])  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]


def test_splits_share_no_problem_and_none_is_trained_on():
    data = DataConfig(sources=(ProblemsSource(count=500),), validation_fraction=0.2)
    splits = splits_of_run(data, MeasureOptions(problems=40, dev=20))
    dev, test = ({item.prompt for item in split.items.values()} for split in (splits.dev, splits.test))
    assert (len(dev), len(test), dev & test) == (20, 40, set())
    assert splits.names == list(ProblemsSource().domains)
    training = [document.text for document in read_documents(data.sources) if not is_validation(document, 0.2)]
    assert not [text for text in training if text.startswith(tuple(dev | test))]


def test_our_problems_behind_worked_ones():
    splits = splits_of_user(MeasureOptions(problems=4, dev=4, demonstrations=3), seed=0)
    item = splits.test.items["5"]
    *shown, asked = item.prompt.split("\n")
    assert len(shown) == 3
    assert all(re.search(r"#-?\w+$", line) for line in shown)
    assert asked.endswith("A")
    assert item.stop == ("\n",)  # pyright: ignore[reportAttributeAccessIssue]


def write_task(path: Path, items: int, **more: object) -> str:
    lines = [
        {"prompt": f"{number}+1=", "answer": number + 1, "preset": "last_number", **more} for number in range(items)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return str(path)


def test_files_of_a_user(tmp_path: Path):
    options = MeasureOptions(problems=9, dev=3, tasks=(write_task(tmp_path / "plus.jsonl", 10),))
    splits = splits_of_user(options, seed=0)
    assert (len(splits.dev.items), len(splits.test.items)) == (3, 7)
    assert not splits.dev.items.keys() & splits.test.items.keys()
    assert splits.names == ["plus"]
    assert list(splits_of_user(options, seed=1).test.items) != list(splits.test.items)
    with pytest.raises(ConfigError, match=r"measure\.dev = 10 leaves nothing of 10 items"):
        splits_of_user(options.model_copy(update={"dev": 10}), seed=0)
    path = tmp_path / "choice.jsonl"
    path.write_text('{"prompt": "a", "choices": ["b", "c"], "answer": 0}\n', encoding="utf-8")
    with pytest.raises(ConfigError, match=r"measure\.tasks = .*choice\.jsonl' has multiple choice"):
        splits_of_user(MeasureOptions(tasks=(str(path),)), seed=0)


def saved(folder: Path, family: str) -> Path:
    """A tiny random checkpoint of a stock family with a tokenizer that lacks a pad token."""
    torch.manual_seed(0)
    common: dict[str, Any] = {
        "vocab_size": 258,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 512,
        "num_experts_per_tok": 2,
    }
    if family == "mixtral":
        model = MixtralForCausalLM(MixtralConfig(**common, num_key_value_heads=1, num_local_experts=4))
    elif family == "qwen3_moe":
        values: dict[str, Any] = {**common, "num_experts_per_tok": 4}
        model = Qwen3MoeForCausalLM(
            Qwen3MoeConfig(**values, num_key_value_heads=1, num_experts=8, moe_intermediate_size=8)
        )
    else:
        model = DeepseekV3ForCausalLM(
            DeepseekV3Config(
                **common,
                num_key_value_heads=2,
                n_routed_experts=8,
                n_group=2,
                topk_group=1,
                n_shared_experts=1,
                moe_intermediate_size=8,
                first_k_dense_replace=1,
                q_lora_rank=8,
                kv_lora_rank=8,
                qk_rope_head_dim=4,
                qk_nope_head_dim=4,
                v_head_dim=8,
            )
        )
    model.save_pretrained(folder)
    tokenizer = train_tokenizer(["1+1=2"], 258)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_a_checkpoint_needs_only_its_path(family: str, tmp_path: Path):
    folder = saved(tmp_path / family, family)
    overrides = [f"checkpoint.path={folder}", "measure.latency_batches=[1, 2]", *SMALL]
    if family == "mixtral":
        overrides.append(f"measure.tasks=[{write_task(tmp_path / 'plus.jsonl', 8, max_new_tokens=3)}]")
    found = reproduce(EXPERIMENT, "gpu", tmp_path / "out", seeds=(0,), overrides=overrides, progress=False)
    measured = found.results[0]["moe"].measurements
    weak = "k=1" if family == "qwen3_moe" else "rank=2"  # four picks of eight
    assert measured[f"kl.{weak}"] >= 0
    assert measured["same.beta_0"] == measured["same.plans"] == 100
    assert measured["test_items"] == 4
    assert measured[f"tokens_per_second.{CONTRAST}.b2"] > 0
    assert found.results[0]["moe"].parameters > found.results[0]["moe"].active_parameters > 0
    text = write_page(found, tmp_path / "page").read_text(encoding="utf-8")
    assert f"| `moe` | {family} |" in text
    assert "training steps" not in text
    assert "initial weights" not in text
    again = reproduce(EXPERIMENT, "gpu", tmp_path / "out", seeds=(0,), overrides=overrides, progress=False)
    assert again.results[0]["moe"].measurements == measured


def test_active_parameters_of_a_stock_model(tmp_path: Path):
    model = load_model(saved(tmp_path, "mixtral"))
    experts = 2 * 4 * 3 * 16 * 16
    assert parameters_of(model) == (model.num_parameters(), model.num_parameters() - experts // 2)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], r"checkpoint\.path = None is missing; give the folder of a model: --set checkpoint\.path=FOLDER"),
        (["checkpoint.path=/nowhere/mixtral"], r"checkpoint\.path = '/nowhere/mixtral' is not a folder"),
        (["checkpoint.dtype=int8"], r"checkpoint\.dtype = 'int8'"),
        (["measure.votes=[5]", "measure.samples=3"], r"votes = \(5,\) ask for more than the 3 samples"),
        (["measure.alpha=2"], r"measure\.alpha = 2 "),
        (["train.steps=3"], r"--set = 'train' is part of a run, and this size trains nothing"),
    ],
)
def test_bad_values_are_named_before_anything_runs(overrides: list[str], message: str, tmp_path: Path):
    with pytest.raises(ConfigError, match=message):
        reproduce(EXPERIMENT, "gpu", tmp_path / "out", overrides=overrides, progress=False)
    assert not (tmp_path / "out").exists()


def test_a_missing_amateur_is_named(found: Reproduction):
    with pytest.raises(ConfigError, match=r"measure\.amateur = 7 is no checkpoint of moe, which has 6, 12"):
        reproduce(EXPERIMENT, "test", found.output, seeds=(0,), overrides=["measure.amateur=7"], jobs=1, progress=False)


def test_other_experiments_take_neither(tmp_path: Path):
    with pytest.raises(ConfigError, match="are options of another experiment"):
        reproduce(TINY, "cpu", tmp_path, overrides=["measure.problems=3"], progress=False)
    with pytest.raises(ConfigError, match="does not go with size cpu, which trains"):
        reproduce(TINY, "cpu", tmp_path, overrides=["checkpoint.path=x"], progress=False)


@pytest.mark.parametrize("size", ["cpu", "test"])
def test_arms_differ_in_their_experts_alone(size: str):
    moe, fine = (arms_of(EXPERIMENT, size)[name].run(0).to_dict() for name in ("moe", "fine"))
    for run in (moe, fine):
        for part in ("experts", "shared_experts", "router"):
            run["moe"].pop(part, None)
    assert moe == fine
