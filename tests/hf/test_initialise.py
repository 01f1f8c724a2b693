"""Weights that are replayed one module at a time equal those of a model that is built whole."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from tests.distributed.models import BACKBONE, spec
from tests.hf.tiny import DENSE_FAMILIES, backbone_config, tiny_spec
from tests.layer.router_rows import ROUTERS, VOCABULARY, N
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama import LlamaForCausalLM

import moesaic
from moesaic.errors import UnsupportedModel
from moesaic.hf.initialise import InitialWeights

SEED = 3
GPT2 = {"model_type": "gpt2", "vocab_size": 61, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}


def moe(backbone: dict[str, Any] | None = None, **changes: Any) -> Any:
    return moesaic.build({**BACKBONE, **(backbone or {})}, spec(**changes))


def stock(values: dict[str, Any], dtype: torch.dtype = torch.float32) -> Any:
    values = dict(values)
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    return AutoModelForCausalLM.from_config(config, dtype=dtype)


def replayed(build: Callable[[], Any]) -> dict[str, Tensor]:
    weights, found = InitialWeights(build), {}
    torch.manual_seed(SEED)
    weights.replay(lambda name, tensor: found.update({name: tensor.clone()}))
    return found


def assert_equal_weights(build: Callable[[], Any]) -> None:
    found = replayed(build)
    state = torch.get_rng_state()
    torch.manual_seed(SEED)
    model = build()
    assert torch.equal(torch.get_rng_state(), state)
    expected = dict([*model.named_parameters(), *model.named_buffers()])
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name].to(tensor.dtype), tensor), name


@pytest.mark.parametrize("name", ROUTERS)
def test_every_router(name: str) -> None:
    experts = {"num_experts": N, "intermediate_size": 4}
    assert_equal_weights(
        lambda: moe({"vocab_size": VOCABULARY}, router=ROUTERS[name].values, balance=[], experts=experts)
    )


@pytest.mark.parametrize("tied", [False, True])
def test_everything_around_the_router(tied: bool) -> None:
    assert_equal_weights(
        lambda: moe(
            {"tie_word_embeddings": tied},
            experts={"num_experts": 4, "intermediate_size": 8, "bias": True},
            shared_experts={"num_experts": 1, "sigmoid_gate": True},
            depth={"capacity": 0.5},
            balance=[{"type": "load_balancing", "coefficient": 0.1, "adaptive": {"capacity_factor": 1.0}}],
        )
    )


@pytest.mark.parametrize("values", [BACKBONE, {**BACKBONE, "tie_word_embeddings": True}, GPT2], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stock_models(values: dict[str, Any], dtype: torch.dtype) -> None:
    """Their constructors draw, too. GPT-2's blocks initialise projections of their parts a second time."""
    assert_equal_weights(lambda: stock(values, dtype))


@pytest.mark.parametrize("family", DENSE_FAMILIES)
def test_every_dense_family(family: str) -> None:
    assert_equal_weights(lambda: AutoModelForCausalLM.from_config(backbone_config(family), dtype=torch.float32))
    assert_equal_weights(lambda: moesaic.build(backbone_config(family), tiny_spec(family)))


def test_buffers_alone() -> None:
    build = functools.partial(moe, router=ROUTERS["hash_balanced"].values | {"vocabulary_size": 61}, balance=[])
    found: dict[str, Tensor] = {}
    InitialWeights(build).buffers(lambda name, tensor: found.update({name: tensor.clone()}))
    expected = dict(build().named_buffers())
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_cast_afterwards() -> None:
    assert_equal_weights(lambda: moe().double())


class Unwritten(LlamaForCausalLM):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.extra = nn.Parameter(torch.zeros(3))


class Sliced(LlamaForCausalLM):
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self.lm_head:
            nn.init.zeros_(cast(Tensor, self.model.norm.weight)[:1])


class Derived(LlamaForCausalLM):
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self.lm_head:
            nn.init.zeros_(self.lm_head.weight)
            self.lm_head.weight[0].add_(self.model.norm.weight)


class DrawsElsewhere(LlamaForCausalLM):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.scale = float(torch.rand((), device="cpu"))


@pytest.mark.parametrize(
    ("kind", "problem"),
    [
        (Unwritten, "leaves extra as the constructor made it"),
        (Sliced, "changes parts of weight of another"),
        (Derived, "made from those of another"),
        (DrawsElsewhere, "draws random numbers"),
    ],
)
def test_what_can_not_be_drawn_in_parts_is_refused(kind: type[LlamaForCausalLM], problem: str) -> None:
    config: Any = AutoConfig.for_model(**BACKBONE)
    with pytest.raises(UnsupportedModel, match=problem):
        replayed(lambda: kind(config))
