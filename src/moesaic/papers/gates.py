"""Gates: the routers that FSMoE's table compares, and their controls, at equal tokens.

FSMoE (arXiv 2501.10714, section 3.1 and table 6) implements GShard's noisy top-k, sigmoid, X-MoE's cosine and expert choice
under one abstraction and compares their speed; it names Soft MoE as a further one. Here their losses stand beside it.
"""

from __future__ import annotations

from typing import Any

from moesaic.papers.claims import Claim, Measured, higher, lower
from moesaic.papers.experiment import Arm, Column, Experiment, Trained
from moesaic.papers.measure import balance, trace

PEEKING = ("expert_choice_peeking", "soft_slots")
"""Arms whose routing of a token depends on later ones, in evaluation too."""


def measure(trained: Trained) -> dict[str, float]:
    """Balance and specialisation, for gates that choose."""
    assert trained.run.moe is not None
    return {} if trained.run.moe.router.runs_all_experts else balance(trace(trained))


def _panel(axes: Any, seeds: list[Measured]) -> None:
    """Loss over training speed."""
    for arm in seeds[0]:
        points = [(seed[arm]["tokens_per_second"], seed[arm]["loss"]) for seed in seeds]
        axes.scatter(*zip(*points, strict=True), label=arm, s=18, marker="x" if arm in PEEKING else "o")
    axes.set(xlabel="training tokens/s", ylabel="validation loss (nats)", title="Speed and loss (x: sees later tokens)")
    axes.legend(frameon=False, fontsize=7)


EXPERIMENT = Experiment(
    name="gates",
    module=__name__,
    title="Gates: five ways to choose experts",
    paper="the gates of FSMoE, [arXiv 2501.10714](https://arxiv.org/abs/2501.10714), section 3.1 and table 6",
    question="How do GShard's, sigmoid, cosine, expert-choice and soft gates compare at equal tokens and active experts?",
    arms={
        "top_k": Arm("softmax top 2, weights renormalised"),
        "noisy": Arm("GShard's noisy top 2: learned Gaussian noise while training"),
        "sigmoid": Arm("top 2 of sigmoid scores, weights as they are"),
        "cosine": Arm("X-MoE: top 2 by cosine in a low dimension, learned temperature"),
        "expert_choice": Arm(
            "experts choose tokens while training; in evaluation a token goes where its score is high enough"
        ),
        "expert_choice_peeking": Arm("experts choose tokens in evaluation too: **sees later tokens**"),
        "soft_slots": Arm("Soft MoE, two slots for a token: **sees later tokens**"),
        "random": Arm("two experts at random, also in evaluation: nothing is learned"),
    },
    control="top_k",
    measure=measure,
    columns={
        "max_violation": Column("MaxVio", 2),
        "load_entropy": Column("load entropy, share of log N", 3),
        "domain_information": Column("domain information, nats", 3),
    },
    claims=(
        Claim(
            "A learned gate beats random assignment",
            "loss(random) - loss(top_k)",
            lower("top_k", "random"),
            ("random", "top_k"),
            "control",
        ),
        Claim(
            "A cosine gate is as good as GShard's",
            "loss(noisy) + 0.01 - loss(cosine)",
            lambda seed: seed["noisy"]["loss"] + 0.01 - seed["cosine"]["loss"],
            ("noisy", "cosine"),
            "X-MoE, arXiv 2204.09179",
        ),
        Claim(
            "A sigmoid gate is as good as GShard's",
            "loss(noisy) + 0.01 - loss(sigmoid)",
            lambda seed: seed["noisy"]["loss"] + 0.01 - seed["sigmoid"]["loss"],
            ("noisy", "sigmoid"),
            "section 3.1",
        ),
        Claim(
            "Expert choice trains faster than GShard's gate",
            "tokens/s(expert_choice) / tokens/s(noisy) - 1",
            lambda seed: seed["expert_choice"]["tokens_per_second"] / seed["noisy"]["tokens_per_second"] - 1,
            ("noisy", "expert_choice"),
            "table 6",
        ),
        Claim(
            "The cosine gate trains slower than GShard's",
            "tokens/s(noisy) / tokens/s(cosine) - 1",
            lambda seed: seed["noisy"]["tokens_per_second"] / seed["cosine"]["tokens_per_second"] - 1,
            ("noisy", "cosine"),
            "table 6",
        ),
        Claim(
            "Choosing among later tokens leaks them",
            "loss(expert_choice) - loss(expert_choice_peeking)",
            lower("expert_choice_peeking", "expert_choice"),
            ("expert_choice", "expert_choice_peeking"),
            "our control",
        ),
        Claim(
            "Thresholds balance worse than choice",
            "MaxVio(expert_choice) - MaxVio(expert_choice_peeking)",
            higher("expert_choice", "expert_choice_peeking", "max_violation"),
            ("expert_choice", "expert_choice_peeking"),
            "our control",
        ),
    ),
    notes=(
        "The losses of `expert_choice_peeking` and `soft_slots` are **not those of language models**: a token's routing "
        "depends on later tokens, so that they can leak into its prediction, and neither can decode. They are there to "
        "show how much, not to be ranked with the others.",
        "`expert_choice` learns with sight of later tokens and is evaluated without, as a decoder must work: its training "
        "and its evaluation differ, which costs loss.",
        "FSMoE compares speed on 32 and 48 GPUs, where the gate is a small share of the time; here speed is that of one "
        "process, and noisy where several run side by side.",
        "All arms have the same experts, which process as many rows: two picks of a token, two tokens' worth of choices, or "
        "twice as many slots as tokens.",
    ),
    panel=_panel,
)
