from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesaic.errors import ConfigError
from moesaic.train import (
    ConstantSchedule,
    CosineSchedule,
    InverseSquareRootSchedule,
    StepSchedule,
    TrainConfig,
    WSDSchedule,
)


@pytest.mark.parametrize(
    "kind", [CosineSchedule, WSDSchedule, StepSchedule, InverseSquareRootSchedule, ConstantSchedule]
)
def test_warm_up_rises_linearly_to_the_peak(kind):
    schedule = kind(warmup_steps=4)
    assert [schedule.factor(step, 100) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]


def test_cosine_follows_its_closed_form():
    schedule = CosineSchedule(warmup_steps=10, min_lr_ratio=0.1)
    for step in range(10, 110):
        expected = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (step - 10) / 100))
        assert schedule.factor(step, 110) == pytest.approx(expected, abs=1e-12)
    assert schedule.factor(60, 110) == pytest.approx(0.55)


@pytest.mark.parametrize(("decay", "shape"), [("linear", lambda p: 1 - p), ("sqrt", lambda p: 1 - math.sqrt(p))])
def test_wsd_is_stable_then_decays(decay, shape):
    schedule = WSDSchedule(warmup_steps=5, decay_fraction=0.25, decay=decay, min_lr_ratio=0.2)
    assert [schedule.factor(step, 100) for step in range(5, 76)] == [1.0] * 71
    for step in range(75, 100):
        assert schedule.factor(step, 100) == pytest.approx(0.2 + 0.8 * shape((step - 75) / 25), abs=1e-12)


@given(
    kind=st.sampled_from([CosineSchedule, WSDSchedule, StepSchedule, InverseSquareRootSchedule, ConstantSchedule]),
    steps=st.integers(1, 300),
    data=st.data(),
)
def test_factor_stays_positive_and_never_exceeds_the_peak(kind, steps, data):
    warmup = data.draw(st.none() | st.integers(0, steps - 1))
    factors = [kind(warmup_steps=warmup).factor(step, steps) for step in range(steps)]
    assert all(0 < factor <= 1 for factor in factors)


def test_steps_of_deepseekmoe():
    schedule = StepSchedule(warmup_steps=2)
    factors = [schedule.factor(step, 100) for step in range(100)]
    assert factors[2:80] == [1.0] * 78
    assert factors[80:90] == pytest.approx([0.316] * 10)
    assert factors[90:] == pytest.approx([0.316**2] * 10)


def test_points_that_do_not_rise_are_refused():
    with pytest.raises(ConfigError, match=r"schedule\.at = .* are not rising shares of the run"):
        TrainConfig.from_dict({"schedule": {"type": "steps", "at": [0.9, 0.8]}})


def test_default_warm_up_is_a_twentieth_of_the_run():
    assert CosineSchedule().warmup(200) == 10
    assert CosineSchedule().warmup(10) == 0


def test_warm_up_longer_than_the_run_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"train\.schedule\.warmup_steps = 50 .* run of 50 steps; choose 0 to 49"):
        TrainConfig.from_dict({"steps": 50, "schedule": {"type": "wsd", "warmup_steps": 50}}, where="train")


def test_inverse_square_root_is_a_plateau_first() -> None:
    """OpenMoE and T5: 0.01 = 1 / sqrt(10000) for 10,000 steps, then 1 / sqrt(step)."""
    schedule = InverseSquareRootSchedule(warmup_steps=0)
    for step in (1, 5_000, 10_000, 10_001, 40_000, 500_000):
        factor = schedule.factor(step - 1, 500_000)
        assert 0.01 * factor == pytest.approx(1 / max(step, 10_000) ** 0.5, rel=1e-12)
    assert InverseSquareRootSchedule(warmup_steps=4, plateau_steps=8).factor(1, 100) == 0.5
