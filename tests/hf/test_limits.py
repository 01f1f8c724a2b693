"""What mechanisms rule out is refused with a reason before any work is done."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from tests.hf.tiny import backbone_config, tiny_spec, token_ids

import moesaic
from moesaic import MoESpec
from moesaic.errors import ConfigError
from moesaic.hf.configuration import MoesaicConfig
from moesaic.hf.limits import check_needs
from moesaic.hf.model import MoesaicForCausalLM
from moesaic.layer import RoutingContext


def test_needs_are_named_by_the_argument_of_the_model() -> None:
    with pytest.raises(ConfigError, match=r"^task_ids = None is required: .* looks at task"):
        check_needs(RoutingContext(), frozenset({"task"}))


def test_stages_do_not_matter_to_routers_without_state() -> None:
    config = MoesaicConfig(backbone=backbone_config("llama"), moe=tiny_spec().to_dict())
    config.distributed_config = SimpleNamespace(pp_size=2)
    MoesaicForCausalLM(config)


@pytest.mark.parametrize("router", [{"type": "hash"}, {"type": "stable"}], ids=str)
def test_routers_by_token_id_know_every_id(router: dict) -> None:
    values = {"experts": {"num_experts": 4, "intermediate_size": 8}, "router": router | {"vocabulary_size": 63}}
    with pytest.raises(ConfigError, match=r"moe\.router\.vocabulary_size = 63 is smaller .* \(64\); set it to 64"):
        moesaic.build(backbone_config("llama", vocab_size=64), MoESpec.from_dict(values))
    moesaic.build(backbone_config("llama", vocab_size=63), MoESpec.from_dict(values))


def test_layers_may_differ_in_experts_and_picks() -> None:
    spec = tiny_spec(layers={"only": [0, 2], "num_experts": [2, 8], "top_k": [1, 4]})
    model = moesaic.build(backbone_config("llama"), spec)
    assert [(block.gate.num_experts, block.gate.top_k) for block in model.moe_blocks().values()] == [(2, 1), (8, 4)]
    assert [block.experts.down_proj.shape[0] for block in model.moe_blocks().values()] == [2, 8]


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"top_k": [1, 5]}, r"moe\.layers\.top_k\.1 = 5 is larger than num_experts \(4\)"),
        ({"num_experts": [4, 1]}, r"moe\.layers\.num_experts\.1 = 1 does not fit .* top_k = 2 is larger than .* \(1\)"),
    ],
)
def test_values_of_a_layer_must_fit(layers: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_spec(layers={"first_dense": 1, **layers})


def test_a_list_has_a_value_for_each_layer() -> None:
    spec = tiny_spec(layers={"first_dense": 1, "num_experts": [4, 4, 4]})
    with pytest.raises(ConfigError, match=r"layers\.num_experts = .* has 3 values for 2 MoE layers"):
        moesaic.build(backbone_config("llama"), spec)


def test_spec_without_lists_is_the_same_at_every_layer() -> None:
    spec: MoESpec = tiny_spec()
    assert spec.at(0) is spec


@pytest.mark.parametrize(
    ("spec", "told", "warned"),
    [
        ({}, False, False),
        ({"balance": [{"type": "z_loss", "coefficient": {"start": 0.1, "end": 0.0}}]}, False, True),
        ({"balance": [{"type": "z_loss", "coefficient": {"start": 0.1, "end": 0.0}}]}, True, False),
        ({"router": {"top_k": 2, "selection_bias": True}, "selection_bias_update": {"rate": 0.001}}, False, True),
        ({"router": {"type": "dense_to_sparse"}}, False, True),
    ],
)
def test_what_moves_by_steps_warns_once_when_no_one_makes_them(
    spec: dict, told: bool, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    model = moesaic.build(backbone_config("llama"), tiny_spec(**spec)).train()
    ids = token_ids()
    if told:
        model.set_training_progress(0.0)
    with caplog.at_level("WARNING", logger="moesaic"):
        model.eval()(ids, labels=ids)
        assert not caplog.records
        model.train()
        for _ in range(2):
            model(ids, labels=ids)
    assert len(caplog.records) == warned
    assert not warned or "RoutingStepCallback" in caplog.text
