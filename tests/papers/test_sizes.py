from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.papers.tiny import EXPERIMENT as TINY
from transformers import AutoModelForCausalLM, PreTrainedModel

from moesaic.errors import ConfigError
from moesaic.hf import build, read_backbone
from moesaic.papers import EXPERIMENTS, Experiment, arms_of, experiment_named, size_names
from moesaic.papers.gates import PEEKING
from moesaic.trace import Accounting, account
from moesaic.train import RunConfig

ALL = [(experiment, size) for experiment in EXPERIMENTS.values() for size in size_names(experiment)]


def on_meta(run: RunConfig) -> PreTrainedModel:
    backbone = run.backbone
    assert isinstance(backbone, dict)
    config = read_backbone({"vocab_size": run.data.tokenizer.vocab_size, **backbone})
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config) if run.moe is None else build(config, run.moe)


def accounts(name: str, size: str) -> dict[str, Accounting]:
    experiment = EXPERIMENTS[name]
    arms = arms_of(experiment, size)
    return {arm: account(on_meta(sized.run(0))) for arm, sized in arms.items() if experiment.arms[arm].parent is None}


def expert_parameters(accounting: Accounting) -> tuple[int, int]:
    parts = [
        accounting.parts[name] for name in ("routed experts", "shared experts", "dense FFN") if name in accounting.parts
    ]
    return sum(part.total for part in parts), sum(part.active for part in parts)


@pytest.mark.parametrize(("experiment", "size"), ALL, ids=lambda value: getattr(value, "name", value))
def test_every_size_gives_runs_that_build(experiment: Experiment, size: str):
    arms = arms_of(experiment, size)
    assert experiment.control in arms
    for name, arm in arms.items():
        if arm.given is not None:
            assert experiment.measure_given is not None
            continue
        parent = experiment.arms[name].parent
        needed = {*experiment.arms[name].after, *([parent] if parent else [])}
        assert needed <= set(list(arms)[: list(arms).index(name)])
        run = arm.run(3, None if parent is None else Path("initial"))
        assert run.train.seed % 100 == run.data.seed % 100 == 3
        if parent is None:
            assert on_meta(run).num_parameters() > 0


@pytest.mark.parametrize("experiment", EXPERIMENTS.values(), ids=lambda experiment: experiment.name)
def test_experiments_are_complete(experiment: Experiment):
    assert {"cpu", "gpu"} <= set(size_names(experiment))
    known = set(experiment.arms)
    assert all(set(claim.arms) <= known for claim in experiment.claims)
    assert experiment.control in known
    used = {arm for size in size_names(experiment) for arm in arms_of(experiment, size)}
    assert used == known


def test_deepseekmoe_arms_are_of_equal_size():
    for size in ("cpu", "gpu"):
        found = accounts("deepseekmoe", size)
        total, active = expert_parameters(found["gshard"])
        for arm in ("shared", "halves", "fine", "fine_weak", "fine_bias", "fine_free"):
            assert expert_parameters(found[arm]) == (total, active)
        assert expert_parameters(found["dense"])[1] == active


def test_deepseekmoe_on_a_gpu_has_the_parameters_of_the_plan():
    found = accounts("deepseekmoe", "gpu")
    standard = 8 * 512**2  # parameters of a standard feed-forward network
    for arm, total, active in [("fine", 16, 2), ("gshard_x1.5", 24, 3), ("dense_x16", 16, 16), ("fine_half", 16, 1)]:
        counted = expert_parameters(found[arm])
        assert counted == pytest.approx((9 * total * standard, 9 * active * standard), rel=2e-3)
    assert found["fine"].parts["routed experts"].total + found["fine"].parts["shared experts"].total == pytest.approx(
        0.302e9, rel=2e-3
    )


def test_rmoe_routers_have_the_parameters_of_the_paper():
    found = {arm: accounting.parts["router"].total for arm, accounting in accounts("rmoe", "gpu").items()}
    assert found["smoe"] == 45_184
    assert found["rmoe"] == found["no_passing"] == found["detached"] == 477_056
    assert found["learned_start"] == 477_056 + 128
    small = {arm: accounting.parts["router"].total for arm, accounting in accounts("rmoe", "cpu").items()}
    for sizes in (found, small):
        assert sizes["mlp"] == pytest.approx(sizes["rmoe"], rel=0.02)


def test_adamoe_on_a_gpu_has_the_parameters_of_the_plan():
    found = accounts("adamoe", "gpu")["pretrained"]
    assert found.parts["routed experts"].total == 12 * 8 * 3 * 768 * 3072
    assert found.parts["routed experts"].active == 12 * 2 * 3 * 768 * 3072


@pytest.mark.parametrize("size", ["cpu", "gpu"])
def test_the_nulls_of_adamoe_are_balanced_as_in_the_paper(size: str):
    for name, arm in arms_of(EXPERIMENTS["adamoe"], size).items():
        if "num_null" not in arm.fork:
            continue
        picks = arm.fork.get("top_k", arm.fork["num_null"] // 8 + 2)
        [loss] = arm.fork["balance"]
        assert loss["coefficient"]["start"] == pytest.approx(0.02 * picks), name
        assert loss["coefficient"]["end"] == pytest.approx(1e-4 * picks), name


@pytest.mark.parametrize("size", ["cpu", "gpu"])
def test_only_the_gates_that_are_said_to_peek_see_later_tokens(size: str):
    for name, arm in arms_of(EXPERIMENTS["gates"], size).items():
        moe = arm.run(0).moe
        assert moe is not None
        assert ("later_tokens" in moe.router.depends_on(training=False)) == (name in PEEKING)


@pytest.mark.parametrize("size", ["cpu", "gpu"])
def test_gates_process_as_many_rows(size: str):
    run = arms_of(EXPERIMENTS["gates"], size)["soft_slots"].run(0)
    assert run.moe is not None
    slots = run.moe.router.to_dict()["slots_per_expert"] * run.moe.experts.num_experts
    assert slots == 2 * run.data.sequence_length


def test_overrides_reach_every_arm_or_one():
    arms = arms_of(TINY, "cpu", ["train.steps=9", "moe.router.top_k=1", "arms.dense.train.learning_rate=0.5"])
    assert list(arms) == ["moe", "dense", "forked"]
    assert {name: arm.values["train"]["steps"] for name, arm in arms.items()} == dict.fromkeys(arms, 9)
    assert arms["moe"].values["moe"]["router"]["top_k"] == 1
    assert arms["dense"].values["moe"] is None
    assert "moe" not in arms["forked"].values
    assert arms["dense"].run(0).train.learning_rate == 0.5
    assert arms["moe"].run(0).train.learning_rate == 1e-3


def test_another_kind_of_router_does_not_inherit_fields():
    arms = arms_of(TINY, "cpu", ['moe.router={"type": "top_k", "top_k": 3}'])
    assert arms["moe"].values["moe"]["router"] == {"type": "top_k", "top_k": 3}


def test_seeds_move_weights_and_order():
    run = arms_of(TINY, "cpu")["forked"].run(7, Path("x"))
    assert (run.train.seed, run.data.seed, run.initial_model) == (7, 107, "x")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["arms.nope.train.steps=1"], "names no arm of tiny; arms: moe, dense, forked"),
        (["train"], "has no `=`"),
    ],
)
def test_bad_overrides(overrides: list[str], message: str):
    with pytest.raises(ConfigError, match=message):
        arms_of(TINY, "cpu", overrides)


def test_a_bad_field_names_the_arm():
    with pytest.raises(ConfigError, match=r"arms\.moe\.moe\.router\.top_k = 9 is larger than num_experts"):
        arms_of(TINY, "cpu", ["moe.router.top_k=9"])["moe"].run(0)


def test_bad_names():
    with pytest.raises(ConfigError, match="is not a reproduction; did you mean 'deepseekmoe'"):
        experiment_named("deepseekmo")
    with pytest.raises(ConfigError, match="is not a size of tiny; choose one of cpu"):
        arms_of(TINY, "huge")
