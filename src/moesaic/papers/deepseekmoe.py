"""DeepSeekMoE: do finer experts and a shared expert lower the loss at equal size, and do experts specialise?

Arms, ablations and tests of arXiv 2401.06066, sections 4.2 to 4.5, and the balance of its successors (2412.19437, 2.1.2).
"""

from __future__ import annotations

from typing import Any

from moesaic.papers.claims import Claim, Measured, higher, lower
from moesaic.papers.experiment import Arm, Column, Experiment, Trained
from moesaic.papers.interventions import more_picks, rerouted, without_best, without_shared_experts
from moesaic.papers.measure import balance, loss, trace

MASKED_SHARES = (16, 8, 4)
"""The best 1/16, 1/8 and 1/4 of the routed experts are taken away."""


def measure(trained: Trained) -> dict[str, float]:
    """Balance, specialisation, and what the loss does when experts are taken away."""
    if trained.run.moe is None:
        return {}
    traced = trace(trained)
    found = balance(traced)
    layer = next(iter(traced.layers.values()))
    normal = loss(trained)
    with rerouted(trained.model, without_best(1)):
        found["without_best.rise"] = loss(trained) - normal
    for share in MASKED_SHARES:
        masked = min(max(1, round(layer.num_experts / share)), layer.num_experts - layer.top_k)
        with rerouted(trained.model, without_best(masked)):
            found[f"masked_{share}th.rise"] = loss(trained) - normal
    if trained.run.moe.shared_experts is not None:
        with without_shared_experts(trained.model), rerouted(trained.model, more_picks(1)):
            found["shared_off.rise"] = loss(trained) - normal
    return found


def _panel(axes: Any, seeds: list[Measured]) -> None:
    """Loss over imbalance of the arms that are one model under different balance rules."""
    for arm in ("fine", "fine_weak", "fine_bias", "fine_free"):
        points = [(seed[arm]["max_violation"], seed[arm]["loss"]) for seed in seeds if arm in seed]
        if points:
            axes.scatter(*zip(*points, strict=True), label=arm, s=18)
    axes.set(xlabel="MaxVio, mean over layers", ylabel="validation loss (nats)", title="One model, four balance rules")
    axes.legend(frameon=False, fontsize=8)


EXPERIMENT = Experiment(
    name="deepseekmoe",
    module=__name__,
    title="DeepSeekMoE: fine-grained and shared experts",
    paper="DeepSeekMoE, [arXiv 2401.06066](https://arxiv.org/abs/2401.06066); balance rules of "
    "[2412.19437](https://arxiv.org/abs/2412.19437)",
    question="Do finer experts and a shared expert lower the loss at equal size, and do experts specialise?",
    arms={
        "gshard": Arm("A: 16 experts, top 2, the conventional MoE"),
        "shared": Arm("B: 1 shared + 15 routed, top 1"),
        "halves": Arm("C: experts cut in two: 1 shared + 31 routed, top 3"),
        "fine": Arm("D: experts cut in four: 1 shared + 63 routed, top 7; balance loss 0.01"),
        "dense": Arm("E: dense, as wide as what a token uses"),
        "gshard_x1.5": Arm("A with experts 1.5 times as wide"),
        "dense_x16": Arm("dense, as wide as all experts of A"),
        "fine_half": Arm("D with half the experts in use: 1 shared + 63 routed, top 3"),
        "fine_weak": Arm("D with balance loss 0.001"),
        "fine_bias": Arm("D with a selection bias that follows the load by 0.001 a step, and balance loss 0.0001"),
        "fine_free": Arm("D without any balance rule"),
    },
    control="gshard",
    measure=measure,
    columns={
        "max_violation": Column("MaxVio", 2),
        "domain_information": Column("domain information, nats", 4),
        "without_best.rise": Column("rise without the best expert", 4),
        "masked_8th.rise": Column("rise without the best eighth", 3),
        "shared_off.rise": Column("rise with shared off", 3),
    },
    claims=(
        Claim(
            "A MoE beats the dense model of equal active size",
            "loss(dense) - loss(gshard)",
            lower("gshard", "dense"),
            ("gshard", "dense"),
            "table 1",
        ),
        Claim(
            "A shared expert helps",
            "loss(gshard) - loss(shared)",
            lower("shared", "gshard"),
            ("gshard", "shared"),
            "section 4.4",
        ),
        Claim(
            "Halved experts help further",
            "loss(shared) - loss(halves)",
            lower("halves", "shared"),
            ("shared", "halves"),
            "figure 3",
        ),
        Claim(
            "Quartered experts help further",
            "loss(halves) - loss(fine)",
            lower("fine", "halves"),
            ("halves", "fine"),
            "figure 3",
        ),
        Claim(
            "The whole recipe beats GShard",
            "loss(gshard) - loss(fine)",
            lower("fine", "gshard"),
            ("gshard", "fine"),
            "table 1",
        ),
        Claim(
            "It does not lose to a GShard with 1.5 times the experts' size",
            "loss(gshard_x1.5) + 0.005 - loss(fine)",
            lambda seed: seed["gshard_x1.5"]["loss"] + 0.005 - seed["fine"]["loss"],
            ("gshard_x1.5", "fine"),
            "table 2",
        ),
        Claim(
            "Half the active experts still beat GShard",
            "loss(gshard) - loss(fine_half)",
            lower("fine_half", "gshard"),
            ("gshard", "fine_half"),
            "figure 6",
        ),
        Claim(
            "The shared expert can't be replaced by a routed one",
            "rise of fine's loss with the shared expert off and one more routed, less 5 times its rise without the best "
            "routed expert",
            lambda seed: seed["fine"]["shared_off.rise"] - 5 * seed["fine"]["without_best.rise"],
            ("fine",),
            "section 4.5",
        ),
        Claim(
            "Fine experts are less redundant",
            "rise without the best eighth of the routed experts: fine - gshard",
            higher("fine", "gshard", "masked_8th.rise"),
            ("fine", "gshard"),
            "figure 4",
        ),
        Claim(
            "Fine experts tell domains apart better",
            "information between domain and routed expert: fine - gshard",
            higher("fine", "gshard", "domain_information"),
            ("fine", "gshard"),
            "section 1; our measure of specialisation",
        ),
        Claim(
            "Without a balance rule the load collapses",
            "MaxVio(fine_free) - MaxVio(fine)",
            higher("fine_free", "fine", "max_violation"),
            ("fine_free", "fine"),
            "section 3.3",
        ),
        Claim(
            "The balance loss keeps MaxVio below 1",
            "1 - MaxVio(fine)",
            lambda seed: 1 - seed["fine"]["max_violation"],
            ("fine",),
            "section 3.3",
        ),
        Claim(
            "A selection bias balances better than a weak loss",
            "MaxVio(fine_weak) - MaxVio(fine_bias)",
            lower("fine_bias", "fine_weak", "max_violation"),
            ("fine_bias", "fine_weak"),
            "DeepSeek-V3, section 2.1.2",
        ),
        Claim(
            "and its loss is not higher",
            "loss(fine_weak) + 0.005 - loss(fine_bias)",
            lambda seed: seed["fine_weak"]["loss"] + 0.005 - seed["fine_bias"]["loss"],
            ("fine_bias", "fine_weak"),
            "DeepSeek-V3, section 4.5.2",
        ),
    ),
    notes=(
        "All MoE arms have the same number of expert parameters and the same number in use for a token; the routers of "
        "finer arms have more rows. Gates are not renormalised in any of them.",
        "The paper compares at 2B parameters after 100B tokens, where A and D are 0.059 nats apart.",
        "A first run with a third of the tokens (0.31M) had the MoE arms behind the dense one in the mean; the size was then "
        "raised to 0.92M, for all arms alike and once.",
        "The rise with experts taken away is that of the trained model's loss, nothing is retrained.",
        "DeepSeek-V3 moves the bias of sigmoid scores that are renormalised; here only the balance rule differs from D.",
    ),
    panel=_panel,
)
