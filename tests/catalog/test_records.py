"""The records of models: complete, consistent with the presets, and honest about what can't be built."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from moesaic.catalog import model, models, preset, presets
from moesaic.catalog.schema import ModelRecord
from moesaic.catalog.shape import Shape
from moesaic.errors import ConfigError

FILES = Path(__file__).parents[2] / "src" / "moesaic" / "catalog" / "models"


def test_there_are_many_and_every_preset_has_a_record() -> None:
    names = [record.name for record in models()]
    assert len(names) >= 66
    assert set(presets()) <= set(names)
    assert {record.name for record in models() if record.buildable} == set(presets())


def test_no_name_stands_in_two_files() -> None:
    names = [name for file in FILES.glob("*.yaml") for name in yaml.safe_load(file.read_text(encoding="utf-8"))]
    assert len(names) == len(set(names))


def test_what_a_preset_says_is_said_once() -> None:
    """Only models without a preset have a shape, a title and a source of their own."""
    for file in FILES.glob("*.yaml"):
        for name, values in yaml.safe_load(file.read_text(encoding="utf-8")).items():
            twice = {"title", "source", "published", "shape", "notes", "deviations"} & values.keys()
            assert not (twice and name in presets()), name


def test_near_models_can_be_built() -> None:
    for record in models():
        if record.unbuildable is not None:
            assert record.unbuildable.near, record.name
            for near in record.unbuildable.near:
                preset(near)


def test_records_round_trip() -> None:
    for record in models():
        assert ModelRecord.from_dict(record.to_dict()) == record


def test_shape_is_read_from_the_preset() -> None:
    shape = model("deepseek-v3").shape
    assert (shape.layers, shape.hidden, shape.heads, shape.kv_heads, shape.head_dim) == (61, 7168, 128, None, None)
    assert shape.latent_attention is not None
    assert shape.latent_attention.query_rank == 1536
    assert (shape.num_experts, shape.top_k, shape.expert_width, shape.shared_width) == (256, 8, 2048, 2048)
    assert (shape.dense_width, shape.moe_layers[0], len(shape.moe_layers)) == (18432, 3, 58)
    pyramid = Shape.of(preset("pr-moe-350m"))
    assert pyramid.experts_per_layer == (32,) * 10 + (64,) * 2
    assert (pyramid.dense_matrices, pyramid.expert_matrices, pyramid.tied_embeddings) == (2, 2, True)


def test_unknown_model_lists_close_ones() -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'jamba-v0.1'\?"):
        model("Jamba")


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"arxiv": "2401.6066v1"}, "some.arxiv"),
        ({"verified": []}, "some.verified"),
        ({"router": {"kind": "magic"}}, "some.router.kind"),
        ({"unbuildable": {"reason": "so it is", "near": []}}, "some.unbuildable"),
        ({"shape": {"layers": 2}}, "some.shape.hidden"),
    ],
)
def test_invalid_values_are_refused_by_field(change: dict, field: str) -> None:
    valid = model("mixtral-8x7b").to_dict()
    with pytest.raises(ConfigError) as caught:
        ModelRecord.from_dict({**valid, **change}, where="some")
    assert caught.value.field == field


def test_experts_for_each_moe_layer_must_be_as_many_as_those() -> None:
    values = model("pr-moe-350m").shape.to_dict()
    with pytest.raises(ConfigError, match="has 1 values for 12 MoE layers"):
        Shape.from_dict({**values, "num_experts": [4]})
