"""Presets as models: parameter counts against the published ones, specs against the stock families."""

from __future__ import annotations

import pytest
import torch
from tests.catalog.built import on_meta
from torch import nn

from moesaic.catalog import ParameterCount, preset, presets
from moesaic.hf import MoesaicForCausalLM, build, read_backbone
from moesaic.hf.conversion import CONVERSIONS, spec_from_config
from moesaic.layer import LoadBalancing
from moesaic.trace import account

RELEASED = [name for name in presets() if not name.startswith("tiny-")]
TINY = [name for name in presets() if name.startswith("tiny-")]
# Those on a backbone of their own family, and like it in everything.
STOCK = [
    name for name in RELEASED if (found := preset(name)).backbone["model_type"] in CONVERSIONS and not found.deviations
]
# Families whose stock head adds a balance loss with the coefficient of the release's config.
STOCK_BALANCE = [name for name in STOCK if name.startswith(("mixtral", "qwen", "flexolmo"))]


def size(*modules: nn.Module | None) -> int:
    """Parameters of the modules together, tied ones once."""
    return sum({id(p): p.numel() for module in modules if module is not None for p in module.parameters()}.values())


def counted(model: MoesaicForCausalLM, counts: str) -> int:
    blocks = model.moe_blocks().values()
    match counts:
        case "model":
            return size(model)
        case "without_input_embedding":
            return size(model) - size(model.get_input_embeddings())
        case "without_embeddings":
            return size(model) - size(model.get_input_embeddings(), model.get_output_embeddings())
        case "experts":
            return size(*(block.experts for block in blocks), *(block.shared_experts for block in blocks))
    raise ValueError(counts)


def idle(model: MoesaicForCausalLM) -> float:
    """Parameters of routed experts that a token does not pick."""
    return sum(
        size(block.experts) * (1 - block.gate.top_k / block.gate.num_experts) for block in model.moe_blocks().values()
    )


def assert_close(parameters: float, published: ParameterCount) -> None:
    assert parameters / 1e9 == pytest.approx(published.billions, rel=published.tolerance)


def flops_per_sequence(name: str, length: int) -> float:
    """Training FLOPs of one sequence, 6 P T + 12 L T^2 h with P the active matrices without the input embedding."""
    model, backbone = on_meta(name), preset(name).backbone
    hidden, layers, vocab = (backbone[key] for key in ("hidden_size", "num_hidden_layers", "vocab_size"))
    experts = counted(model, "experts") - idle(model)
    dense = 3 * hidden * backbone["intermediate_size"] * (layers - len(model.moe_blocks()))
    active = experts + dense + 4 * hidden**2 * layers + vocab * hidden
    return 6 * active * length + 12 * layers * length**2 * hidden


@pytest.mark.parametrize("name", RELEASED)
def test_parameter_counts_are_the_published_ones(name: str) -> None:
    model, published = on_meta(name), preset(name).published
    if published is None:
        pytest.skip("its authors print none")
    assert_close(counted(model, published.total.counts), published.total)
    if published.active is not None:
        assert_close(counted(model, published.active.counts) - idle(model), published.active)


def test_deepseekmoe_counts_to_four_digits() -> None:
    model = on_meta("deepseekmoe-16b")
    assert size(model) / 1e9 == pytest.approx(16.37, abs=0.01)
    assert (size(model) - idle(model)) / 1e9 == pytest.approx(2.82, abs=0.01)
    model = on_meta("deepseekmoe-2b-validation")
    assert counted(model, "experts") / 1e9 == pytest.approx(1.887, abs=0.001)
    assert (counted(model, "experts") - idle(model)) / 1e9 == pytest.approx(0.236, abs=0.001)


def test_deepseekmoe_flops_are_the_printed_ones() -> None:
    assert flops_per_sequence("deepseekmoe-2b-validation", 2048) / 1e12 == pytest.approx(4.3, abs=0.05)
    # Table 3 prints 74.4; the formula, which fits all of table 1, gives 75.8.
    assert flops_per_sequence("deepseekmoe-16b", 4096) / 1e12 == pytest.approx(74.4, rel=0.02)


def test_stock_presets_are_of_many_families() -> None:
    assert {preset(name).backbone["model_type"] for name in STOCK} == {
        "deepseek_v2",
        "deepseek_v3",
        "flex_olmo",
        "glm4_moe",
        "gpt_oss",
        "granitemoe",
        "mixtral",
        "olmoe",
        "qwen2_moe",
        "qwen3_moe",
    }


@pytest.mark.parametrize("name", STOCK)
def test_stock_presets_say_what_the_stock_config_says(name: str) -> None:
    found = preset(name)
    assert found.moe.model_copy(update={"balance": (), "selection_bias_update": None}) == spec_from_config(
        read_backbone(found.backbone)
    )


@pytest.mark.parametrize("name", STOCK_BALANCE)
def test_balance_losses_are_the_stock_ones(name: str) -> None:
    found = preset(name)
    stock = spec_from_config(read_backbone({**found.backbone, "output_router_logits": True}))
    (ours,), (theirs,) = found.moe.balance, stock.balance
    assert isinstance(ours, LoadBalancing)
    assert isinstance(theirs, LoadBalancing)
    assert ours.scope == theirs.scope
    assert ours.coefficient == pytest.approx(theirs.coefficient)


@pytest.mark.parametrize(
    ("name", "total", "active", "moe_layers"),
    [
        ("openmoe-base", 0.800, 0.535, [3, 7, 11]),
        ("openmoe-8b", 11.855, 3.802, [5, 11, 17, 23]),
        ("openmoe-34b", 46.271, 10.032, [3, 7, 11, 15, 19, 23, 27, 31]),
    ],
)
def test_openmoe_has_the_size_of_the_released_files(name: str, total: float, active: float, moe_layers: list) -> None:
    model, backbone = on_meta(name), preset(name).backbone
    accounting = account(model)
    assert accounting.total / 1e9 == pytest.approx(total, abs=0.0006)
    assert accounting.active / 1e9 == pytest.approx(active, abs=0.0006)
    assert list(model.moe_blocks()) == moe_layers
    hidden, width, layers = (backbone[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    assert accounting.parts["dense FFN"].total == (layers - len(moe_layers)) * 4 * hidden * width
    assert accounting.parts["shared experts"].total == len(moe_layers) * 4 * hidden * width
    attention = backbone["num_attention_heads"] * backbone["head_dim"]
    assert accounting.parts["attention"].total == layers * 4 * hidden * attention
    assert accounting.parts["embeddings"].total == accounting.parts["output head"].total == 256384 * hidden


def test_openmoe_8b_by_the_paper_has_three_matrices_and_one_embedding() -> None:
    """The gap to the printed 8.7 B is the double gate and the untied head."""
    total = size(on_meta("openmoe-8b"))
    double_gate, head = (20 + 4 * 33) * 2048 * 8192, 256384 * 2048
    assert (double_gate / 1e9, head / 1e9) == (pytest.approx(2.55, abs=0.005), pytest.approx(0.53, abs=0.006))
    assert (total - double_gate - head) / 1e9 == pytest.approx(8.78, abs=0.005)


@pytest.mark.parametrize(("name", "group", "train", "evaluation"), [("openmoe-8b", 4096, 160, 256)])
def test_openmoe_capacity_is_that_of_its_training(name: str, group: int, train: int, evaluation: int) -> None:
    found = preset(name).moe
    assert found.capacity is not None
    slots = [found.capacity.slots(torch.tensor(group), 32, 2, training=training).item() for training in (True, False)]
    assert slots == [train, evaluation]
    assert slots[0] * 32 / (2 * group) == 0.625  # of all picks, at most


def test_openmoe_attention_is_not_scaled() -> None:
    scalings = {
        module.scaling for module in on_meta("openmoe-base").modules() if type(module).__name__ == "GraniteAttention"
    }
    assert scalings == {1.0}


def test_tiny_openmoe_has_the_size_of_the_pilot() -> None:
    found = preset("tiny-openmoe")
    assert size(build(found.backbone, found.moe)) / 1e6 == pytest.approx(1.08, abs=0.01)


@pytest.mark.parametrize("name", TINY)
def test_tiny_presets_run(name: str) -> None:
    found = preset(name)
    model = build(found.backbone, found.moe)
    assert size(model) < 10e6
    ids = torch.arange(16).view(2, 8)
    output = model(ids, labels=ids)
    output.loss.backward()
    assert set(output.aux_losses) == {loss.name for loss in found.moe.balance}
    gates = [parameter for block in model.moe_blocks().values() for parameter in block.gate.parameters()]
    assert all(gate.grad is not None and gate.grad.abs().sum() > 0 for gate in gates)
