"""What changes once an optimiser step: selection bias and adaptive coefficients, from the load of the whole step."""

from __future__ import annotations

from functools import reduce
from operator import add
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.distributed.spawn import run_ranks
from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.layer import (
    AdaptiveCoefficient,
    LayerLoad,
    MoEBlock,
    MoESpec,
    RoutingContext,
    SelectionBiasUpdate,
    all_reduce_loads,
    loads_of,
    max_violation,
    post_step,
)

BASE: dict[str, Any] = {
    "experts": {"num_experts": 4, "intermediate_size": 8},
    "router": {"type": "top_k", "top_k": 2, "score_function": "sigmoid", "selection_bias": True},
    "selection_bias_update": {},
}


def load_of(chosen: list[int], dropped: int = 0) -> LayerLoad:
    chosen_M = torch.tensor(chosen)
    return LayerLoad(chosen_M, chosen_M, torch.tensor(dropped), chosen_M.sum())


def moved(chosen: list[int], progress: float = 0.0, **update: Any) -> list[float]:
    bias_M = torch.zeros(len(chosen))
    SelectionBiasUpdate.from_dict(update).apply(bias_M, torch.tensor(chosen), progress)
    return bias_M.tolist()


# --- Selection bias ---------------------------------------------------------------------------------------------------


def test_worked_example() -> None:
    """DeepSeek-V3 (arXiv 2412.19437, section 2.1.2) with loads 10, 6, 8, 0 and rate 0.001; then the mean taken off."""
    assert moved([10, 6, 8, 0], center=False) == pytest.approx([-0.001, 0, -0.001, 0.001])
    assert moved([10, 6, 8, 0]) == pytest.approx([-0.00075, 0.00025, -0.00075, 0.00125])
    assert max_violation(torch.tensor([10, 6, 8, 0])).item() == pytest.approx(2 / 3)


def test_proportional_rule_does_not_depend_on_the_size_of_the_batch() -> None:
    small = moved([10, 6, 8, 0], rule="proportional", rate=0.1)
    assert small == pytest.approx([-0.1 * 4 / 6, 0, -0.1 * 2 / 6, 0.1])
    assert moved([1000, 600, 800, 0], rule="proportional", rate=0.1) == pytest.approx(small)


@pytest.mark.parametrize("rule", ["sign", "proportional"])
def test_balanced_and_empty_steps_move_nothing(rule: str) -> None:
    assert moved([5, 5, 5], rule=rule) == [0, 0, 0]
    assert moved([0, 0, 0], rule=rule) == [0, 0, 0]


def test_a_schedule_to_zero_freezes_the_bias() -> None:
    rate = {"start": 0.001, "end": 0.0, "shape": "step", "begin": 0.9}
    assert moved([2, 0], 0.89, rate=rate) == pytest.approx([-0.001, 0.001])
    assert moved([2, 0], 0.9, rate=rate) == [0, 0]


@pytest.mark.parametrize(
    ("rate", "steps", "start", "end"),
    [(0.01, 100, 1.7, 0.2), (0.001, 100, 1.7, 0.75), (0.001, 500, 1.7, 0.05)],
)
def test_control_loop_balances_a_skewed_router(rate: float, steps: int, start: float, end: float) -> None:
    """512 tokens, 16 experts, K = 4, three experts favoured by 1.5: balanced by the bias alone, finer for lower rates."""
    spec = MoESpec.from_dict(
        {
            "experts": {"num_experts": 16, "intermediate_size": 1},
            "router": {"type": "top_k", "top_k": 4, "score_function": "sigmoid", "selection_bias": True},
            "selection_bias_update": {"rate": rate},
        }
    )
    block = MoEBlock(spec, 16)
    torch.manual_seed(0)
    x_TD = torch.randn(512, 16)
    x_TD[:, :3] += 1.5
    with torch.no_grad():
        block.gate.weight.copy_(torch.eye(16))
    violations = []
    for _ in range(steps):
        load = LayerLoad.of(block.gate(x_TD))
        violations.append(max_violation(load.chosen_M).item())
        post_step({0: block}, {0: load}, 0.0)
    assert violations[0] > start - 0.3
    assert max(violations[-5:]) < end
    bias_N = block.gate.e_score_correction_bias
    assert bias_N.mean().abs() < 1e-6
    assert bias_N[:3].max() < bias_N[3:].min()


def test_bias_is_state_but_no_parameter_and_stays_float32() -> None:
    block = MoEBlock(MoESpec.from_dict(BASE), 8).bfloat16()
    post_step({0: block}, {0: load_of([3, 1, 0, 0])}, 0.0)
    assert block.gate.e_score_correction_bias.dtype == torch.float32
    assert block.gate.e_score_correction_bias.tolist() == pytest.approx([-0.001, 0, 0.001, 0.001], abs=3e-4)
    assert "gate.e_score_correction_bias" in block.state_dict()
    assert "gate.e_score_correction_bias" not in dict(block.named_parameters())


def test_without_an_update_the_bias_stays() -> None:
    block = MoEBlock(MoESpec.from_dict({**BASE, "selection_bias_update": None}), 8)
    post_step({0: block}, {0: load_of([3, 1, 0, 0])}, 0.0)
    assert not block.gate.e_score_correction_bias.any()


def test_a_layer_that_did_not_run_stays() -> None:
    blocks = {layer: MoEBlock(MoESpec.from_dict(BASE), 8, layer=layer) for layer in (0, 1)}
    post_step(blocks, {1: load_of([3, 1, 0, 0])}, 0.0)
    assert not blocks[0].gate.e_score_correction_bias.any()
    assert blocks[1].gate.e_score_correction_bias.any()


# --- The load of a step over micro-batches and processes ----------------------------------------------------------------


THRESHOLDS = {"type": "expert_choice", "decoding": "threshold", "capacity_factor": 1.5}
STEPS: dict[str, dict[str, Any]] = {
    "selection bias": BASE,
    "expert choice": {**BASE, "router": THRESHOLDS, "selection_bias_update": None},
    "drops of a capacity": {
        **BASE,
        "capacity": {"factor": 1.0, "minimum": 0},
        "balance": [{"type": "load_balancing", "coefficient": 0.004, "adaptive": {}}],
    },
    "depth": {**BASE, "depth": {"capacity": 0.5}},
    "depth and expert choice": {
        **BASE,
        "router": THRESHOLDS,
        "selection_bias_update": None,
        "depth": {"capacity": 0.5},
    },
    "temperature": {**BASE, "router": {"type": "dense_to_sparse", "noise": False}, "selection_bias_update": None},
}
steps = pytest.mark.parametrize("values", STEPS.values(), ids=STEPS.keys())


def blocks_and_batch(values: dict[str, Any]) -> tuple[dict[int, MoEBlock], Tensor, Tensor]:
    torch.manual_seed(0)
    blocks = {layer: MoEBlock(MoESpec.from_dict(values), 8, layer=layer) for layer in range(2)}
    for block in blocks.values():
        torch.nn.init.normal_(block.gate.weight)
    mask_BL = torch.tensor([[1] * 5, [1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 0]]).bool()
    return blocks, torch.randn(4, 5, 8) + torch.arange(4.0)[:, None, None], mask_BL


def loads(blocks: dict[int, MoEBlock], x_BLD: Tensor, mask_BL: Tensor) -> dict[int, LayerLoad]:
    context = RoutingContext(batch_size=x_BLD.shape[0], mask_T=mask_BL.flatten())
    for block in blocks.values():
        x_BLD = x_BLD + block(x_BLD, context)
    return loads_of(context)


def state_after_two_steps(values: dict[str, Any], parts: list[slice]) -> dict[str, Tensor]:
    """All buffers of the blocks; those of the beginning are in the second step's routing."""
    blocks, x_BLD, mask_BL = blocks_and_batch(values)
    for progress in (0.25, 0.5):
        micro_batches = [loads(blocks, x_BLD[part], mask_BL[part]) for part in parts]
        total = {layer: reduce(add, (load[layer] for load in micro_batches)) for layer in blocks}
        post_step(blocks, all_reduce_loads(total), progress)
    return {f"{layer}.{name}": tensor for layer, block in blocks.items() for name, tensor in block.named_buffers()}


@steps
def test_accumulation_moves_state_as_one_batch_does(values: dict[str, Any]) -> None:
    blocks, _, _ = blocks_and_batch(values)
    before = {f"{layer}.{name}": tensor for layer, block in blocks.items() for name, tensor in block.named_buffers()}
    whole = state_after_two_steps(values, [slice(0, 4)])
    assert before
    assert all(not torch.equal(whole[name], tensor) for name, tensor in before.items())
    parts = [slice(0, 1), slice(1, 3), slice(3, 4)]
    torch.testing.assert_close(state_after_two_steps(values, parts), whole)


def on_rank() -> dict[str, dict[str, Tensor]]:
    parts = [slice(0, 1)] if dist.get_rank() == 0 else [slice(1, 2), slice(2, 4)]
    return {name: state_after_two_steps(values, parts) for name, values in STEPS.items()}


def test_two_processes_move_state_as_one_does() -> None:
    first, second = run_ranks(2, on_rank)
    whole = {name: state_after_two_steps(values, [slice(0, 4)]) for name, values in STEPS.items()}
    for name, expected in whole.items():
        torch.testing.assert_close(first[name], expected)
        torch.testing.assert_close(second[name], first[name], rtol=0, atol=0)


# --- Adaptive coefficients ----------------------------------------------------------------------------------------------


def adaptive_block(**adaptive: Any) -> MoEBlock:
    loss = {"type": "load_balancing", "coefficient": 0.004, "adaptive": adaptive}
    return MoEBlock(MoESpec.from_dict({**BASE, "balance": [{"type": "z_loss", "coefficient": 1.0}, loss]}), 8)


def test_coefficient_follows_the_drop_rate() -> None:
    """Skywork-MoE (arXiv 2406.06563): a <- .99 a + .01 min(.2 d, .01)."""
    config = AdaptiveCoefficient()
    for dropped, target in ((0, 0.0), (2, 0.2 * 2 / 102), (50, 0.01)):
        following = config.next(torch.tensor(0.004), load_of([100, 0], dropped))
        assert following.item() == pytest.approx(0.99 * 0.004 + 0.01 * target)


def test_a_capacity_factor_counts_what_would_be_dropped() -> None:
    config = AdaptiveCoefficient(capacity_factor=1.25)
    # Mean 6, room for 7.5: 2.5 of 24 are over.
    assert config.drop_rate(load_of([10, 6, 7, 1])).item() == pytest.approx(2.5 / 24)
    assert config.drop_rate(load_of([0, 0, 0, 0])).item() == 0


def test_drops_of_a_capacity_drive_the_coefficient() -> None:
    loss = {"type": "z_loss", "coefficient": 0.0, "adaptive": {"decay": 0.0, "rate": 1.0, "maximum": 1.0}}
    block = MoEBlock(MoESpec.from_dict({**BASE, "capacity": {"factor": 0.5}, "balance": [loss]}), 8)
    context = RoutingContext()
    block(torch.randn(12, 8), context)
    (load,) = loads_of(context).values()
    assert 0 < load.drop_rate < 1
    post_step({0: block}, {0: load}, 0.0)
    assert block.coefficients_by_loss()["z_loss"].item() == pytest.approx(load.drop_rate.item())


def test_each_layer_has_its_own_coefficient_which_is_saved_and_stays_float32() -> None:
    block = adaptive_block(capacity_factor=1.0, decay=0.9, rate=1.0, maximum=0.5).bfloat16()
    assert {name: value.item() for name, value in block.coefficients_by_loss().items()} == {
        "load_balancing": pytest.approx(0.004)
    }
    post_step({0: block}, {0: load_of([8, 0, 0, 0])}, 0.0)
    (coefficient,) = block.coefficients_by_loss().values()
    assert coefficient.dtype == torch.float32
    assert coefficient.item() == pytest.approx(0.9 * 0.004 + 0.1 * 0.5)
    other = adaptive_block(capacity_factor=1.0)
    other.load_state_dict(block.float().state_dict())
    assert other.coefficients_by_loss()["load_balancing"].item() == pytest.approx(0.0536)


def test_blocks_without_adaptive_losses_have_no_state_for_them() -> None:
    assert "adaptive_coefficients" not in MoEBlock(MoESpec.from_dict(BASE), 8).state_dict()


# --- Configuration ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"router": {"type": "top_k", "top_k": 2}},
            r"selection_bias_update = .* finds no bias in router top_k; give it `selection_bias: true`",
        ),
        ({"selection_bias_update": {"rate": -1}}, r"selection_bias_update\.rate = -1 is not valid; .*greater than"),
        (
            {"selection_bias_update": {"rate": {"start": 1, "end": -1}}},
            r"selection_bias_update\.rate\.end = -1 is not valid; .*greater than or equal to 0",
        ),
        (
            {"selection_bias_update": {"rate": {"start": 1, "end": 0, "shap": "step"}}},
            r"selection_bias_update\.rate\.shap = 'step' is not a known key; did you mean 'shape'",
        ),
        (
            {"balance": [{"type": "load_balancing", "coefficient": 1, "adaptive": {}}]},
            r"balance\.0\.adaptive\.capacity_factor = None is needed where no capacity drops picks",
        ),
        (
            {
                "balance": [
                    {"type": "z_loss", "coefficient": {"start": 1, "end": 0}, "adaptive": {"capacity_factor": 1}}
                ]
            },
            r"balance\.0\.adaptive = .* does not go with a schedule",
        ),
    ],
)
def test_bad_input_is_refused_by_name(values: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        MoESpec.from_dict({**BASE, **values})


def test_specs_with_schedules_round_trip() -> None:
    spec = MoESpec.from_dict(
        {
            **BASE,
            "selection_bias_update": {"rate": {"start": 0.001, "end": 0.0, "shape": "step", "begin": 0.9}},
            "balance": [{"type": "load_balancing", "coefficient": {"start": 0.02, "end": 1e-4}}],
        }
    )
    assert MoESpec.from_dict(spec.to_dict()) == spec
