"""An experiment of seconds: two arms on Python's own text, and a third that starts from the first."""

from __future__ import annotations

import torch

from moesaic.papers import Arm, Claim, Column, Experiment, Forking, Trained
from moesaic.papers.claims import lower
from moesaic.papers.measure import balance, trace
from moesaic.train import load_model


def measure(trained: Trained) -> dict[str, float]:
    return balance(trace(trained)) if trained.run.moe is not None else {}


def louder_router(forking: Forking) -> None:
    """The parent's model with router weights multiplied by `factor`, for a dense arm that learned something."""
    assert forking.measured["dense"]["loss"] > 0
    model = load_model(forking.checkpoint)
    with torch.no_grad():
        for block in model.moe_blocks().values():  # pyright: ignore[reportCallIssue]
            block.gate.weight *= forking.options["factor"]
    model.save_pretrained(forking.folder)


EXPERIMENT = Experiment(
    name="tiny",
    module=__name__,
    title="Tiny: a test",
    paper="no paper",
    question="Does the harness work?",
    arms={
        "moe": Arm("four experts"),
        "dense": Arm("none"),
        "forked": Arm("the first with a louder router", parent="moe", fork=louder_router, after=("dense",)),
        "absent": Arm("an arm of another size"),
    },
    control="moe",
    measure=measure,
    columns={"max_violation": Column("MaxVio", 2)},
    claims=(
        Claim("The MoE is better", "loss(dense) - loss(moe)", lower("moe", "dense"), ("moe", "dense"), "nowhere"),
        Claim("Losses are positive", "loss(moe)", lambda seed: seed["moe"]["loss"], ("moe",)),
        Claim("Losses are negative", "-loss(moe)", lambda seed: -seed["moe"]["loss"], ("moe",)),
        Claim("Of another size", "loss(absent)", lambda seed: seed["absent"]["loss"], ("absent",)),
    ),
    notes=("It says nothing.",),
)
