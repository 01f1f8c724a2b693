"""The byte model: the worked numbers of Mixtral, and counts of real generations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.infer.decode.models import GREEDY, own, padded_ids, stock
from transformers import AutoConfig, AutoModelForCausalLM

import moesaic
from moesaic.errors import ConfigError
from moesaic.hf.weight_sizes import WeightSizes, weight_sizes
from moesaic.infer.decode import SelfContrast
from moesaic.infer.decode.cost import Work, pass_bytes
from moesaic.infer.decode.counting import count_work

# Weights of Mixtral 8x7B in billions, and how many of rank-2's and rank-3's experts are outside the top 2 (SCMoE, table 6).
MIXTRAL = WeightSizes(shared=1.60, experts={0: 5.64})
OUTSIDE = {2: 0.4621, 3: 0.7262}


def test_worked_numbers_of_mixtral() -> None:
    greedy, weak = pass_bytes(MIXTRAL, 2), pass_bytes(MIXTRAL, 1)
    assert greedy == pytest.approx(12.88)
    assert weak == pytest.approx(7.24)
    assert (greedy + weak) / greedy == pytest.approx(1.56, abs=0.005)
    assert pass_bytes(MIXTRAL, 2 + OUTSIDE[2]) / greedy == pytest.approx(1.20, abs=0.005)
    assert pass_bytes(MIXTRAL, 2 + OUTSIDE[3]) / greedy == pytest.approx(1.32, abs=0.005)
    with pytest.raises(ConfigError, match="layer 1"):
        pass_bytes(MIXTRAL, {0: 2, 1: 2})


def test_mixtral_is_as_large_as_the_worked_numbers_say() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral"), dtype=torch.bfloat16)
    sizes = weight_sizes(model)
    embedding = 2 * 32000 * 4096  # the input table, of which a step reads a row
    assert (sizes.shared + embedding) / 2e9 == pytest.approx(1.60, abs=0.01)
    assert sizes.per_expert / 2e9 == pytest.approx(5.64, abs=0.01)
    assert sizes.head == embedding


@pytest.mark.parametrize("name", ["own", "mixtral", "qwen2_moe", "llama"])
def test_sizes_add_up(name: str) -> None:
    model: Any = own() if name == "own" else stock(name)
    sizes = weight_sizes(model)
    stored = sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))
    table = model.get_input_embeddings().weight
    assert sizes.shared + 4 * sizes.per_expert == stored - table.numel() * table.element_size()
    assert bool(sizes.experts) == (name != "llama")


@pytest.mark.parametrize("name", ["own", "mixtral"])
def test_generation_is_counted(name: str) -> None:
    model: Any = own() if name == "own" else stock(name)
    sizes, ids = weight_sizes(model), torch.tensor([[5, 9, 23, 11]])

    def counted(**options: Any) -> Work:
        with count_work(model) as count:
            model.generate(ids, **{**GREEDY, **options})
        return count.work

    # The prompt is left out: what 12 tokens take, without what one takes.
    greedy = counted() - counted(max_new_tokens=1)
    assert (greedy.passes, greedy.positions, greedy.experts_per_layer) == (11, 11, 2)
    assert greedy.scaled(1 / 11).weight_bytes == pytest.approx(pass_bytes(sizes, 2))
    with moesaic.override_routing(model, "k=3"):
        assert (counted() - counted(max_new_tokens=1)).experts_per_layer == 3
    two_rows, two_passes = (
        counted(custom_generate=plan) - counted(custom_generate=plan, max_new_tokens=1)
        for plan in (SelfContrast(), SelfContrast(plan="two_passes"))
    )
    assert (two_rows.passes, two_rows.positions) == (11, 22)
    assert (two_passes.passes, two_passes.positions) == (22, 22)
    both = pass_bytes(sizes, 2) + pass_bytes(sizes, 1)
    assert two_passes.scaled(1 / 11).weight_bytes == pytest.approx(both)
    assert 2 <= two_rows.experts_per_layer <= 3
    union = two_rows.experts_per_layer
    assert two_rows.scaled(1 / 11).weight_bytes == pytest.approx(pass_bytes(sizes, union))
    assert not model._forward_pre_hooks


def test_padding_picks_no_experts() -> None:
    model, (ids, mask) = stock("mixtral"), padded_ids()
    with count_work(model) as count, torch.no_grad():
        model(ids[:1, :5], attention_mask=mask[:1, :5], use_cache=False)
    assert count.work.experts_per_layer == 2  # of the one token that is not padding
    assert count.work.positions == 5
