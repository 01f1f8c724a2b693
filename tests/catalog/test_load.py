"""Finding presets, and what their files may say."""

from __future__ import annotations

import pytest

from moesaic.catalog import Preset, preset, presets
from moesaic.errors import ConfigError

VALID = {
    "name": "some",
    "title": "Some",
    "source": "nowhere",
    "backbone": {"model_type": "llama", "num_hidden_layers": 2},
    "moe": {"experts": {"num_experts": 4, "intermediate_size": 8}, "router": {"top_k": 2}},
}


@pytest.mark.parametrize("name", presets())
def test_every_preset_is_valid_and_round_trips(name: str) -> None:
    found = preset(name)
    assert found.name == name
    assert Preset.from_dict(found.to_dict()) == found


def test_released_presets_have_published_counts() -> None:
    # The paper of Branch-Train-MiX prints none.
    assert [name for name in presets() if preset(name).published is None] == [
        name for name in presets() if name.startswith("tiny-") or name == "btx-llama2-7b-x4"
    ]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("switch-c-2048", "can't be built: it is an encoder-decoder.*nearest that can be is 'ds-moe-1.3b-128'"),
        ("phi-3.5-moe", "sparsemixer.*'mixtral-8x7b'"),
    ],
)
def test_a_model_that_cannot_be_built_says_why_and_what_is_near(name: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        preset(name)


def test_unknown_name_lists_close_ones() -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'deepseekmoe-16b'.*known are .*mixtral-8x7b"):
        preset("DeepSeekMoE-16")


@pytest.mark.parametrize("name", ["", "../data/mixtral-8x7b", "mixtral-8x7b.yaml"])
def test_only_names_are_accepted(name: str) -> None:
    with pytest.raises(ConfigError, match="is not a preset"):
        preset(name)


def test_changing_a_presets_backbone_leaves_the_catalog_alone() -> None:
    preset("tiny-fine-grained").backbone["hidden_size"] = 7
    assert preset("tiny-fine-grained").backbone["hidden_size"] == 32


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"backbone": {"num_hidden_layers": 2}}, "backbone.model_type"),
        ({"backbone": {"model_type": "llama"}}, "backbone.num_hidden_layers"),
        ({"moe": {**VALID["moe"], "layers": {"only": [2]}}}, "moe.layers.only"),
        ({"moe": {**VALID["moe"], "router": {"top_k": 5}}}, "moe.router.top_k"),
        ({"colour": "blue"}, "colour"),
    ],
)
def test_invalid_values_are_refused_by_field(change: dict, field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Preset.from_dict({**VALID, **change}, where="some")
    assert caught.value.field == f"some.{field}"
