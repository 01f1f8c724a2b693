"""Picks of no expert under every `experts_implementation`: skipped, or refused before anything runs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.hf.tiny import backbone_config, randomise, tiny_model, tiny_spec, token_ids
from torch import Tensor
from transformers.integrations.moe import ExpertsInterface

import moesaic
from moesaic.errors import UnsupportedDecoding, UnsupportedExport, UnsupportedKernel
from moesaic.hf.configuration import MoesaicConfig
from moesaic.hf.experts import MoesaicExperts, supports_no_expert
from moesaic.hf.model import MoesaicForCausalLM
from moesaic.layer import ExpertsConfig, loads_of

SKIPPING = [name for name in ("eager", "moesaic", *ExpertsInterface._global_mapping) if supports_no_expert(name)]
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")

CAPACITY = {"factor": 0.5, "minimum": 1}
NULLS = {"type": "null_experts", "top_k": 3, "num_null": 2}


def poison(tensor: Tensor) -> None:
    """Leave NaN in memory that the allocator will give out again."""
    blocks = [torch.full_like(tensor, float("nan")) for _ in range(32)]
    del blocks


@pytest.mark.parametrize("dropped_weight", [0.0, 0.7], ids=["zero", "any"])
@pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("name", SKIPPING)
def test_picks_of_no_expert_add_nothing_to_output_and_gradients(
    name: str, gated: bool, bias: bool, dropped_weight: float
) -> None:
    config: Any = SimpleNamespace(_experts_implementation=name)
    sizes = ExpertsConfig(num_experts=4, intermediate_size=16, gated=gated, bias=bias, kernel="loop")
    experts = randomise(MoesaicExperts(config, sizes, 32))
    generator = torch.Generator().manual_seed(0)
    index_TK = torch.tensor([[4, 0], [2, 4], [4, 4], [1, 3]]).repeat(8, 1)
    weight_TK = torch.rand(32, 2, generator=generator).masked_fill(index_TK == 4, dropped_weight).requires_grad_()
    x_TD = torch.randn(32, 32, generator=generator, requires_grad=True)
    upstream_TD = torch.randn(32, 32, generator=generator)
    leaves = {"x": x_TD, "weight": weight_TK, **dict(experts.named_parameters())}

    def run(name: str) -> dict[str, Tensor]:
        config._experts_implementation = name
        poison(torch.empty(64, 32))
        y_TD = experts(x_TD, index_TK, weight_TK)
        poison(torch.empty(64, 32))
        return {
            "y": y_TD,
            **dict(zip(leaves, torch.autograd.grad(y_TD, list(leaves.values()), upstream_TD), strict=True)),
        }

    found, expected = run(name), run("moesaic")
    assert not expected["y"][2::4].any()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", SKIPPING)
@pytest.mark.parametrize(
    "values",
    [{"capacity": CAPACITY}, {"router": NULLS}, {"router": NULLS, "capacity": CAPACITY}],
    ids=["capacity", "nulls", "both"],
)
def test_a_model_computes_the_same_under_each(values: dict[str, Any], name: str, training: bool) -> None:
    ids, found = token_ids(), []
    for implementation in ("moesaic", name):
        model = tiny_model(**values).train(training)
        model.set_experts_implementation(implementation)
        output = model(ids, labels=ids, output_routing=True)
        output.loss.backward()
        found.append([output.logits, output.loss, *(p.grad for p in model.parameters())])
        dropped = sum(int(load.dropped) for load in loads_of(output.routing).values())
        assert (dropped > 0) == (training and "capacity" in values)
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["deepgemm", "sonicmoe"])
@pytest.mark.parametrize(
    ("values", "part"), [({"capacity": CAPACITY}, "capacity"), ({"router": NULLS}, "router null_experts")]
)
def test_an_implementation_that_is_not_known_to_skip_is_refused(values: dict, part: str, name: str) -> None:
    message = f"experts_implementation = '{name}' is not known to skip .* the {part} of this model"
    model = tiny_model(**values)
    with pytest.raises(UnsupportedKernel, match=message):
        model.set_experts_implementation(name)
    assert model.config._experts_implementation == "moesaic"
    config = MoesaicConfig(backbone=backbone_config("llama"), moe=tiny_spec(**values).to_dict())
    with pytest.raises(UnsupportedKernel, match=message):
        MoesaicForCausalLM._from_config(config, experts_implementation=name)


def test_any_implementation_may_be_set_where_every_pick_is_an_expert() -> None:
    model = tiny_model()
    model.set_experts_implementation("sonicmoe")
    assert model.config._experts_implementation == "sonicmoe"


def test_cached_decoding_is_refused_for_a_capacity_in_evaluation_only() -> None:
    ids, arguments = token_ids(), {"max_new_tokens": 2, "do_sample": False}
    tiny_model(capacity={"factor": 0.5}).generate(ids, **arguments)
    with pytest.raises(UnsupportedDecoding, match=r"moe\.capacity.*set eval_factor to null"):
        tiny_model(capacity={"factor": None, "eval_factor": 0.5}).generate(ids, **arguments)


def test_export_refuses_a_capacity_which_stock_families_do_not_have() -> None:
    with pytest.raises(UnsupportedExport, match=r"moe\.capacity"):
        moesaic.export(tiny_model(layers={}, capacity=CAPACITY))


def test_a_capacity_survives_saving(tmp_path: Any) -> None:
    model = tiny_model(capacity={**CAPACITY, "eval_factor": 0.75, "policy": "probability"})
    model.save_pretrained(tmp_path)
    loaded = MoesaicForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.config.spec == model.config.spec
    assert torch.equal(loaded(token_ids()).logits, model(token_ids()).logits)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_drops_the_same_tokens(use_reentrant: bool) -> None:
    ids, found = token_ids(), []
    for checkpointed in (False, True):
        model = tiny_model(capacity={**CAPACITY, "policy": "random", "renormalize": True}).train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        torch.manual_seed(3)
        output = model(ids, labels=ids)
        output.loss.backward()
        found.append([output.loss, *(p.grad for p in model.parameters())])
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-7)
