from __future__ import annotations

import torch
from tests.train.builders import MOE, tiny_run

from moesaic.train import TrainConfig, build_model
from moesaic.train.optimizer import build_optimizer, parameter_groups, set_learning_rate


def test_only_matrices_that_are_not_biases_are_decayed(data):
    run = tiny_run(data.config)
    moe = {**MOE, "experts": {**MOE["experts"], "bias": True}}
    run = type(run).from_dict({**run.to_dict(), "moe": moe})
    model = build_model(run, data.tokenizer)
    names = {id(parameter): name for name, parameter in model.named_parameters()}

    decayed, others = parameter_groups(model, 0.1)

    decayed_names = {names[id(parameter)] for parameter in decayed["params"]}
    other_names = {names[id(parameter)] for parameter in others["params"]}
    assert decayed["weight_decay"] == 0.1
    assert others["weight_decay"] == 0.0
    assert decayed_names | other_names == set(names.values())
    assert not decayed_names & other_names
    assert all("norm" in name or name.endswith("bias") for name in other_names)
    assert any(name.endswith("gate_up_proj_bias") for name in other_names)
    assert any(name.endswith("experts.gate_up_proj") for name in decayed_names)
    assert any(name.endswith("gate.weight") for name in decayed_names)


def test_frozen_parameters_are_left_out_and_empty_groups_too():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False), torch.nn.LayerNorm(2))
    model[1].requires_grad_(False)
    assert [len(group["params"]) for group in parameter_groups(model, 0.1)] == [1]


def test_adamw_is_fused_and_takes_the_configured_values():
    config = TrainConfig(betas=(0.8, 0.9), epsilon=1e-6, learning_rate=0.5)
    optimizer = build_optimizer(torch.nn.Linear(2, 2), config, torch.device("cpu"))
    assert optimizer.defaults["fused"] is True
    assert all(
        (group["betas"], group["eps"], group["lr"]) == ((0.8, 0.9), 1e-6, 0.5) for group in optimizer.param_groups
    )
    set_learning_rate(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]
