"""OpenMoE: do experts choose by token id, how early, and who is dropped? Does instruction data early help?

Findings of arXiv 2402.01739 (sections 4.1 to 4.3) with their controls, the remedy that it proposes (section 5), and the
balance loss per sequence (DeepSeek-V3, arXiv 2412.19437, section 2.1.2) beside it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import Any

from moesaic.papers.claims import Claim, Measured, lower
from moesaic.papers.experiment import Arm, Column, Experiment
from moesaic.papers.openmoe_measure import measure
from moesaic.papers.openmoe_page import SECTIONS

Numbers = Mapping[str, float]


def in_weakest_layer(
    advantage: Callable[[Callable[[str], float]], float], arm: str = "base"
) -> Callable[[Measured], float]:
    """The lowest of the advantages of the MoE layers, each of which looks up measurements of its layer."""

    def lowest(measured: Measured) -> float:
        numbers = measured[arm]
        layers = [name.rpartition(".")[2] for name in numbers if name.startswith("token_s.")]
        return min(advantage(lambda name, layer=layer: numbers[f"{name}.{layer}"]) for layer in layers)

    return lowest


def _of_base(advantage: Callable[[Numbers], float]) -> Callable[[Measured], float]:
    return lambda measured: advantage(measured["base"])


def _trained_on(numbers: Numbers) -> float:
    """Loss on the kinds of text that all arms train on."""
    return statistics.fmean((numbers["loss.code"], numbers["loss.documentation"]))


def _panel(axes: Any, seeds: list[Measured]) -> None:
    """Drops on chat over the loss on it, an arm a colour."""
    for arm in EXPERIMENT.arms:
        points = [(seed[arm]["loss.chat"], seed[arm]["drop.chat"]) for seed in seeds if arm in seed]
        if points:
            axes.scatter(*zip(*points, strict=True), label=arm, s=18)
    axes.set(
        xlabel="loss on chat (nats)", ylabel="dropped picks of chat (%)", title="Remedies on chat, capacity factor 2"
    )
    axes.legend(frameon=False, fontsize=8)


CLAIMS = (
    Claim(
        "Token ids are specialised far above noise",
        "s of token ids - 3 floors, in the weakest layer",
        in_weakest_layer(lambda of: of("token_s") - 3 * of("token_floor")),
        ("base",),
        "section 4.1, figures 13 and 14",
    ),
    Claim(
        "and far more than positions",
        "s of token ids - 4 times s of positions, in the weakest layer",
        in_weakest_layer(lambda of: of("token_s") - 4 * of("position_s")),
        ("base",),
        "section 4.1",
    ),
    Claim(
        "The token id explains a third of the routing",
        "NMI of token ids - 0.35, in the weakest layer",
        in_weakest_layer(lambda of: of("token_nmi") - 0.35),
        ("base",),
        "section 4.1; our measure",
    ),
    Claim(
        "which is no artefact of counting",
        "NMI of token ids - 4 times that of shuffled labels, in the weakest layer",
        in_weakest_layer(lambda of: of("token_nmi") - 4 * of("token_nmi_permuted")),
        ("base",),
        "our control",
    ),
    Claim(
        "The position explains nothing",
        "2 times the NMI of shuffled positions - NMI of positions, in the weakest layer",
        in_weakest_layer(lambda of: 2 * of("position_nmi_permuted") - of("position_nmi")),
        ("base",),
        "section 4.1, figure 9",
    ),
    Claim(
        "Training adds to what an untrained router does by token id",
        "NMI of token ids: last step - step 0, in the weakest layer",
        in_weakest_layer(lambda of: of("token_nmi") - of("start_token_nmi")),
        ("base",),
        "our control",
    ),
    Claim(
        "Training makes most of it",
        "half the NMI of token ids at the end - that at step 0, in the weakest layer",
        in_weakest_layer(lambda of: of("token_nmi") / 2 - of("start_token_nmi")),
        ("base",),
        "our control",
    ),
    Claim(
        "Routing is mostly settled halfway",
        "saturation at half of the steps - 0.6, in the weakest layer",
        in_weakest_layer(lambda of: of("saturation.half") - 0.6),
        ("base",),
        "section 4.2, figure 11",
    ),
    Claim(
        "From a quarter of the steps on it only settles further",
        "smallest rise of saturation between checkpoints, in the weakest layer",
        in_weakest_layer(lambda of: of("saturation.least_rise")),
        ("base",),
        "section 4.2",
    ),
    Claim(
        "Routing is learned early: half of it at the end of the warm-up",
        "corrected saturation at the end of the warm-up - 0.5, mean over layers",
        _of_base(lambda of: of["saturation_corrected.warm_up"] - 0.5),
        ("base",),
        "section 4.2",
    ),
    Claim(
        "Late tokens are dropped more often",
        "drops in percent, in-domain: last quarter - 4 times the first",
        _of_base(lambda of: of["drop.in_domain.q4"] - 4 * of["drop.in_domain.q1"]),
        ("base",),
        "section 4.3, figure 12",
    ),
    Claim(
        "for more than that they come late",
        "rise of drops from the first to the last quarter, in-domain: as it is - with tokens in random order",
        _of_base(
            lambda of: (
                of["drop.in_domain.q4"] - of["drop.in_domain.q1"] - (of["drop_permuted.q4"] - of["drop_permuted.q1"])
            )
        ),
        ("base",),
        "our control",
    ),
    Claim(
        "Chat, which is not trained on, is dropped more often",
        "drops in percent: chat - 1.3 times in-domain",
        _of_base(lambda of: of["drop.chat"] - 1.3 * of["drop.in_domain"]),
        ("base",),
        "section 4.3",
    ),
    Claim(
        "as are numbers, far more",
        "drops in percent: numbers - 5 times in-domain",
        _of_base(lambda of: of["drop.numbers"] - 5 * of["drop.in_domain"]),
        ("base",),
        "section 4.3",
    ),
    Claim(
        "Chat early in training lowers its drops",
        "drops of chat in percent: base - chat_early",
        lower("chat_early", "base", "drop.chat"),
        ("base", "chat_early"),
        "section 5",
    ),
    Claim(
        "and more so than chat late",
        "drops of chat in percent: chat_late - chat_early",
        lower("chat_early", "chat_late", "drop.chat"),
        ("chat_early", "chat_late"),
        "section 5; our control",
    ),
    Claim(
        "So does chat early for longer",
        "drops of chat in percent: base - chat_early_long",
        lower("chat_early_long", "base", "drop.chat"),
        ("base", "chat_early_long"),
        "section 5",
    ),
    Claim(
        "and more so than chat late for as long",
        "drops of chat in percent: chat_late_long - chat_early_long",
        lower("chat_early_long", "chat_late_long", "drop.chat"),
        ("chat_early_long", "chat_late_long"),
        "section 5; our control",
    ),
    Claim(
        "Balance within each sequence lowers the drops of chat",
        "drops of chat in percent: base - per_sequence",
        lower("per_sequence", "base", "drop.chat"),
        ("base", "per_sequence"),
        "DeepSeek-V3, section 2.1.2",
    ),
    Claim(
        "by two fifths at least",
        "drops of chat in percent: 0.6 times base - per_sequence",
        lambda seed: 0.6 * seed["base"]["drop.chat"] - seed["per_sequence"]["drop.chat"],
        ("base", "per_sequence"),
        "our bar",
    ),
    Claim(
        "and those of the text that is trained on by as much",
        "drops in percent, in-domain: 0.6 times base - per_sequence",
        lambda seed: 0.6 * seed["base"]["drop.in_domain"] - seed["per_sequence"]["drop.in_domain"],
        ("base", "per_sequence"),
        "our bar",
    ),
    Claim(
        "at no cost",
        "loss on code and documentation: base + 0.03 - per_sequence",
        lambda seed: _trained_on(seed["base"]) + 0.03 - _trained_on(seed["per_sequence"]),
        ("base", "per_sequence"),
        "our bar",
    ),
)


EXPERIMENT = Experiment(
    name="openmoe",
    module=__name__,
    title="OpenMoE: what routers look at, when they decide, and whom they drop",
    paper="OpenMoE, [arXiv 2402.01739](https://arxiv.org/abs/2402.01739), with metrics of OLMoE, "
    "[2409.02060](https://arxiv.org/abs/2409.02060)",
    question="Do experts choose by token id, how early do they, and are late tokens of a sequence dropped more often?",
    arms={
        "base": Arm("half code, half documentation; balance over the whole batch"),
        "per_sequence": Arm("the same balance loss within each sequence"),
        "chat_early": Arm("30 % chat in the first eighth of the steps"),
        "chat_late": Arm("as much chat in the last eighth: the control of chat_early"),
        "chat_early_long": Arm("30 % chat in the first three eighths of the steps"),
        "chat_late_long": Arm("as much chat in the last three eighths: the control of chat_early_long"),
        "capacity": Arm("trained with a capacity factor of 1.25"),
    },
    control="base",
    measure=measure,
    columns={
        "max_violation": Column("MaxVio", 2),
        "token_nmi": Column("NMI of token ids", 3),
        "drop.in_domain": Column("drops in-domain, %", 1),
        "drop.chat": Column("drops of chat, %", 1),
        "drop.numbers": Column("drops of numbers, %", 1),
    },
    claims=CLAIMS,
    notes=(
        "In size `cpu`, experts do choose by token id and not by position, as the paper says. Most of that is there before "
        "training: an untrained router sees the embedding, so equal ids look alike to it. Training raises it, most in the "
        "upper layer.",
        "Routers settle while the learning rate falls, long after the warm-up; at its end they agree little more with the last "
        "model than the untrained ones do.",
        "Late tokens are dropped far more often, but no more than if the same tokens came in random order: capacity filled in "
        "order does it, wherever experts are unevenly loaded within a sequence. Random picks, which are even, drop nothing at a "
        "factor of 2.",
        "Text that is new to the model is dropped more where it repeats itself (numbers), and not where it does not (chat). "
        "Chat early in training does not lower the drops of chat, rather the opposite, and chat late does no worse; the loss "
        "on chat is lowest where chat came last.",
        "The balance loss within each sequence does lower drops, of all kinds of text, at about the same loss.",
        "`loss` is over all kinds of text; no arm trains on numbers, and only the chat arms on chat. Documentation holds the "
        "docstrings that chat gives as answers, so chat is new in form more than in content.",
        "Code, documentation and chat that come from one file are held out together. Routing is looked at on 96 whole held-out "
        "sequences of each kind, evenly spread.",
        "Experts and the fixed feed-forward network are SwiGLU, as the paper prints them; its code has a second gate. Gates are "
        "not renormalised. The balance loss is 1 at perfect balance here and K in the paper, and summed over layers where the "
        "paper averages: with K = 2 and two layers the weight of 0.01 is the same in both.",
        "The capacity is that of OpenMoE's PyTorch code, floor(K cf T / E), made even, but of each sequence by itself: with one "
        "for the batch, its last sequences would lose instead of its last positions.",
        "How far an untrained router already goes by token id depends on the initial weights: with a standard deviation of 0.02 "
        "everywhere, the untrained layers add little to the embedding that they get.",
        "Under first come, first served the order of filling moves drops, not their number: totals of the two orders are equal.",
        "That routing settles within the warm-up could not be seen by the paper, whose first checkpoint is after 200B tokens.",
    ),
    panel=_panel,
    sections=SECTIONS,
)
