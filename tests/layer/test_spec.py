"""The spec: placement of MoE layers, round trips, and errors that say where in the section they stand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moesaic.errors import ConfigError
from moesaic.layer import LayerPlacement, LoadBalancing, MoESpec

FULL: dict[str, Any] = {
    "experts": {"num_experts": 8, "intermediate_size": 16, "bias": True, "kernel": "loop"},
    "router": {
        "type": "top_k",
        "top_k": 3,
        "score_function": "sigmoid",
        "normalize_top_k": True,
        "normalization_epsilon": 1e-20,
        "scaling_factor": 2.5,
        "selection_bias": True,
        "num_groups": 4,
        "top_k_groups": 2,
        "group_score": "top2_sum",
    },
    "shared_experts": {"num_experts": 2, "sigmoid_gate": True},
    "layers": {"first_dense": 1, "every": 2},
    "balance": [
        {"type": "load_balancing", "coefficient": 0.01, "scope": "batch"},
        {"type": "z_loss", "coefficient": 1},
    ],
    "dropout": 0.1,
}
SMALL: dict[str, Any] = {
    "experts": {"num_experts": 4, "intermediate_size": 8},
    "router": {"type": "top_k", "top_k": 2},
}


def nested(base: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """`base` with one value set."""
    head, _, rest = path.partition(".")
    return {**base, head: nested(base.get(head, {}), rest, value) if rest else value}


@pytest.mark.parametrize("values", [SMALL, FULL], ids=["small", "full"])
def test_round_trips_through_dict_and_yaml(values: dict[str, Any], tmp_path: Path) -> None:
    spec = MoESpec.from_dict(values)
    assert MoESpec.from_dict(spec.to_dict()) == spec
    path = tmp_path / "moe.yaml"
    path.write_text(spec.to_yaml(), encoding="utf-8")
    assert MoESpec.from_yaml(path) == spec


def test_values_arrive() -> None:
    spec = MoESpec.from_dict(FULL)
    assert (spec.experts.num_experts, spec.router.top_k, spec.router.normalization_epsilon) == (8, 3, 1e-20)
    assert spec.balance[0] == LoadBalancing(coefficient=0.01, scope="batch")
    assert spec.shared_width == 32
    assert MoESpec.from_dict(SMALL).shared_width == 0


def test_overrides_reach_into_lists(tmp_path: Path) -> None:
    path = tmp_path / "moe.yaml"
    path.write_text(MoESpec.from_dict(FULL).to_yaml(), encoding="utf-8")
    spec = MoESpec.from_yaml(path, ["router.top_k=4", "balance.1.coefficient=0.5", "shared_experts=null"])
    assert (spec.router.top_k, spec.balance[1].coefficient, spec.shared_experts) == (4, 0.5, None)


@pytest.mark.parametrize(
    ("rule", "indices"),
    [
        ({}, (0, 1, 2, 3, 4, 5)),
        ({"first_dense": 1}, (1, 2, 3, 4, 5)),
        ({"every": 2}, (1, 3, 5)),
        ({"every": 4}, (3,)),
        ({"first_dense": 1, "every": 2}, (2, 4)),
        ({"only": [4, 0, 4]}, (0, 4)),
    ],
)
def test_placement(rule: dict[str, Any], indices: tuple[int, ...]) -> None:
    assert LayerPlacement.from_dict(rule).indices(6) == indices


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"first_dense": 6}, r"moe\.layers = .*leaves no MoE layer among 6; lower first_dense or every"),
        ({"every": 7}, r"moe\.layers = .*leaves no MoE layer among 6"),
        ({"only": []}, r"moe\.layers = .*leaves no MoE layer among 6; .*name layers in only"),
        ({"only": [2, 6]}, r"moe\.layers\.only = 6 is not a layer; choose 0 to 5"),
    ],
)
def test_placement_that_does_not_fit_the_model_is_refused(rule: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        LayerPlacement.from_dict(rule).indices(6)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("router.top_k", 5, r"moe\.router\.top_k = 5 is larger than num_experts \(4\); choose 1 to 4"),
        ("router.topk", 2, r"moe\.router\.topk = 2 is not a known key; did you mean 'top_k'\?"),
        ("experts.num_expert", 8, r"moe\.experts\.num_expert = 8 is not a known key; did you mean 'num_experts'\?"),
        ("experts", None, r"moe\.experts = None is not valid"),
        ("dropout", 1.0, r"moe\.dropout = 1\.0 is not valid; input should be less than 1"),
        ("layers.every", 0, r"moe\.layers\.every = 0 is not valid; input should be greater than 0"),
        (
            "balance",
            [{"type": "z_loss", "coefficient": 1}, {"type": "z_loss", "coefficient": 2}],
            r"moe\.balance = \['z_loss', 'z_loss'\] names a loss twice; keep one of them, or give each",
        ),
        ("capacity", {"factr": 1.0}, r"moe\.capacity\.factr = 1\.0 is not a known key; did you mean 'factor'\?"),
        ("capacity", 1.25, r"moe\.capacity = 1\.25 is not valid; write `key: value` pairs in its place"),
        ("depth", {"capacity": 1.5}, r"moe\.depth\.capacity = 1\.5 is not valid; .*less than or equal to 1"),
        ("depth", {"decoding": "threshold"}, r"moe\.depth\.decoding = 'threshold' is not taught without the .* depth"),
        ("balance", {"type": "z_loss"}, r"moe\.balance = .* is not valid; write a list in its place"),
        (
            "balance",
            [{"type": "load", "coefficient": 0.1}],
            r"moe\.balance\.0\.type = 'load' needs a router that knows the probability of each pick; use router noisy",
        ),
        (
            "balance",
            [{"type": "router", "loss": "distillation", "coefficient": 0.1}],
            r"moe\.balance\.0\.loss = 'distillation' is no loss of router top_k; remove this entry",
        ),
        (
            "balance",
            [{"type": "depth", "coefficient": 0.1}],
            r"moe\.balance\.0\.type = 'depth' teaches what only depth\.decoding: threshold uses; remove it",
        ),
        ("selection_bias_update", {}, r"moe\.selection_bias_update = .* finds no bias in router top_k; give it"),
        ("layers.top_k", [1, 5], r"moe\.layers\.top_k\.1 = 5 is larger than num_experts \(4\); choose 1 to 4"),
        (
            "layers.num_experts",
            [1, 4],
            r"moe\.layers\.num_experts\.0 = 1 does not fit the router, whose top_k = 2 is larger .* \(1\); give that",
        ),
        ("shared_experts.width", 3, r"moe\.shared_experts\.width = 3 is not a known key; known here: "),
        (
            "router.num_groups",
            2,
            r"moe\.router\.top_k_groups = None is missing: num_groups and top_k_groups go together; set both or neither",
        ),
    ],
)
def test_errors_name_the_place_the_value_and_the_remedy(path: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        MoESpec.from_dict(nested(SMALL, path, value), where="moe")


def test_shared_experts_do_not_go_with_clamped_swiglu() -> None:
    experts = {**SMALL["experts"], "activation": "clamped_swiglu", "swiglu_alpha": 1.702, "swiglu_limit": 7.0}
    with pytest.raises(ConfigError, match=r"^shared_experts = .* can't use clamped_swiglu; use silu"):
        MoESpec.from_dict({**SMALL, "experts": experts, "shared_experts": {}})


@pytest.mark.parametrize("rule", [{"first_dense": 1}, {"every": 2}])
def test_a_list_of_layers_does_not_go_with_a_rule(rule: dict[str, int]) -> None:
    with pytest.raises(
        ConfigError, match=r"only = \(1,\) does not go with first_dense or every; give the indices alone"
    ):
        LayerPlacement.from_dict({"only": [1], **rule})


@pytest.mark.parametrize("kind", ["expert_choice", "soft_slots", "mixture_of_tokens", "merged", "dense"])
def test_a_capacity_needs_picks(kind: str) -> None:
    values = {**SMALL, "router": {"type": kind}, "capacity": {"factor": 1.0}}
    with pytest.raises(ConfigError, match=rf"^moe\.capacity = .* does not go with router {kind}: .*; remove it"):
        MoESpec.from_dict(values, where="moe")


def test_layers_can_only_list_picks_for_a_router_that_has_them() -> None:
    values = {**SMALL, "router": {"type": "dense"}, "layers": {"top_k": [1, 2]}}
    with pytest.raises(ConfigError, match=r"^moe\.layers\.top_k = \(1, 2\) means nothing to dense; remove it"):
        MoESpec.from_dict(values, where="moe")


def test_what_a_model_must_be_told() -> None:
    assert MoESpec.from_dict(SMALL).needs == frozenset()
    by_id = {**SMALL, "router": {"type": "hash", "vocabulary_size": 9, "num_domains": 2}}
    assert MoESpec.from_dict(by_id).needs == {"token_ids", "task"}
    losses = [
        {"type": "local_entropy", "coefficient": 0.1, "modality": 1},
        {"type": "mutual_information", "coefficient": 0.1, "given": "task", "num_labels": 2, "scope": "batch"},
    ]
    assert MoESpec.from_dict({**SMALL, "balance": losses}).needs == {"modality", "task"}


def test_a_router_section_without_type_is_top_k() -> None:
    spec = MoESpec.from_dict({"experts": {"num_experts": 8, "intermediate_size": 4}, "router": {"top_k": 2}})
    assert spec.router.type == "top_k"


@pytest.mark.parametrize(
    ("router", "message"),
    [
        ({"type": "top_k", "topk": 2}, r"^moe.router.topk = 2 is not a known key; did you mean 'top_k'"),
        (
            {"type": "null_experts", "top_k": 12, "num_null": 3},
            r"^moe.router.top_k = 12 is larger than .* \(11\); choose",
        ),
        (
            {"type": "mlp", "top_k": 2, "hiden_size": 4},
            r"^moe.router.hiden_size = 4 is not a known key; did you mean 'hid",
        ),
        ({"type": "noisy_topk"}, r"^moe.router.type = 'noisy_topk' is not one of the choices; .*'noisy_top_k'"),
        ({"type": "noisy_top_k"}, r"^moe.router.top_k = None is required"),
        ({}, r"^moe.router.top_k = None is required"),
    ],
)
def test_errors_of_a_router_section_name_the_field(router: dict, message: str) -> None:
    values = {"experts": {"num_experts": 8, "intermediate_size": 4}, "router": router}
    with pytest.raises(ConfigError, match=message):
        MoESpec.from_dict(values, where="moe")
