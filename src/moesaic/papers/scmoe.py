"""SCMoE: does a model answer better if a weak routing of its own is set against its strong one, and how far apart are they?

Tables and figures of arXiv 2405.14507 with models that are trained here, or with one that a user brings. The gain in accuracy
is a property of large pretrained models; what a small one can show is how its passes differ, and that decoding is exact.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence

import torch

from moesaic.papers.claims import Claim, Measured
from moesaic.papers.experiment import Arm, Column, Experiment
from moesaic.papers.scmoe_decodings import (
    AMATEUR,
    CONTRAST,
    DEFAULT,
    DOLA,
    DYNAMIC,
    ENSEMBLE,
    GREEDY,
    SEARCH,
    STRONGER,
)
from moesaic.papers.scmoe_latency import TWO_PASSES
from moesaic.papers.scmoe_measure import CONTRASTED, PLAIN, measure, measure_given
from moesaic.papers.scmoe_options import MeasureOptions
from moesaic.papers.scmoe_page import SECTIONS, panel

Numbers = Mapping[str, float]


def _of(arm: str, advantage: Callable[[Numbers], float]) -> Callable[[Measured], float]:
    """The advantage of an arm's numbers; nan, which resolves nothing, if one of them was not measured."""

    def found(measured: Measured) -> float:
        try:
            return advantage(measured[arm])
        except KeyError:
            return math.nan

    return found


def _gain(better: str, worse: str) -> Callable[[Numbers], float]:
    return lambda of: of[f"accuracy.{better}"] - of[f"accuracy.{worse}"]


def _by_number(of: Numbers) -> dict[int, float]:
    """Accuracy by number of experts."""
    return {int(name.removeprefix("experts.")): of[name] for name in of if name.startswith("experts.")}


def _trained_less_best(of: Numbers) -> float:
    accuracies = _by_number(of)
    return accuracies[int(of["trained_picks"])] - max(accuracies.values())


def _trained_less_single(of: Numbers) -> float:
    accuracies = _by_number(of)
    return accuracies[int(of["trained_picks"])] - accuracies[1]


def _trained_less_most(of: Numbers) -> float:
    accuracies = _by_number(of)
    return accuracies[int(of["trained_picks"])] - accuracies[max(accuracies)]


def _by_rank(of: Numbers, name: str) -> list[float]:
    """A measurement of the passes by rank, from 1."""
    ranks = itertools.takewhile(lambda rank: f"{name}.rank={rank}" in of, itertools.count(1))
    found = [of[f"{name}.rank={rank}"] for rank in ranks]
    if len(found) < 3:
        raise KeyError(name)
    return found


def rank_correlation(values: Sequence[float]) -> float:
    """Spearman's correlation of values with their place in the list; ties keep their order."""
    place_N = torch.tensor(values, dtype=torch.float64).argsort(stable=True).argsort().double()
    return float(torch.corrcoef(torch.stack([place_N, torch.arange(len(values), dtype=torch.float64)]))[0, 1])


def _random_between(of: Numbers) -> float:
    ranks = _by_rank(of, "kl")
    return min(of["kl.random=1"] - ranks[1], max(ranks) - of["kl.random=1"])


CLAIMS = (
    Claim(
        "The trained number of experts is the best, within 2 points",
        "accuracy in percent: trained number + 2 - best number",
        _of("moe", lambda of: _trained_less_best(of) + 2),
        ("moe",),
        "figure 1 and table 7, where one more is better on some tasks; our bar",
    ),
    Claim(
        "A single expert is worse",
        "accuracy in percent: trained number - one expert",
        _of("moe", _trained_less_single),
        ("moe",),
        "table 7",
    ),
    Claim(
        "and so are most of the experts at once",
        "accuracy in percent: trained number - largest number",
        _of("moe", _trained_less_most),
        ("moe",),
        "table 7",
    ),
    Claim(
        "The first expert alone is nearest to the trained routing",
        "KL in nats: half of the least of ranks 2 and up - rank 1",
        _of("moe", lambda of: min(_by_rank(of, "kl")[1:]) / 2 - _by_rank(of, "kl")[0]),
        ("moe",),
        "table 5",
    ),
    Claim(
        "The lower the rank, the further its pass",
        "rank correlation of KL with the rank - 0.7",
        _of("moe", lambda of: rank_correlation(_by_rank(of, "kl")) - 0.7),
        ("moe",),
        "table 5, where it is 1; our bar",
    ),
    Claim(
        "A random expert lies between rank 2 and the furthest rank",
        "KL in nats: the smaller of random - rank 2 and furthest - random",
        _of("moe", _random_between),
        ("moe",),
        "table 5",
    ),
    Claim(
        "Passes differ more at expressions than at words",
        "KL in nats, rank 2: tokens of expressions - others",
        _of("moe", lambda of: of["kl_expression.rank=2"] - of["kl_other.rank=2"]),
        ("moe",),
        "table 5",
    ),
    Claim(
        "The first-rank pass runs experts that the trained one picks",
        "10 - unchosen experts in percent, rank 1",
        _of("moe", lambda of: 10 - of["unchosen.rank=1"]),
        ("moe",),
        "table 6: 2.81; our bar",
    ),
    Claim(
        "the second-rank pass already others, for a part",
        "unchosen experts in percent: the smaller of rank 2 - 2 times rank 1 and rank 3 - rank 2",
        _of(
            "moe",
            lambda of: min(
                of["unchosen.rank=2"] - 2 * of["unchosen.rank=1"], of["unchosen.rank=3"] - of["unchosen.rank=2"]
            ),
        ),
        ("moe",),
        "table 6: 2.81, 46.21, 72.62",
    ),
    Claim(
        "and lower ranks mostly others",
        "unchosen experts in percent, least of ranks 3 and up - 60",
        _of("moe", lambda of: min(_by_rank(of, "unchosen")[2:]) - 60),
        ("moe",),
        "table 6; our bar",
    ),
    Claim(
        "Self-contrast beats greedy decoding",
        "accuracy in percent: self-contrast - greedy",
        _of("moe", _gain(CONTRAST, GREEDY)),
        ("moe",),
        "table 1",
    ),
    Claim(
        "also with the setting fixed before",
        "accuracy in percent: rank 2, beta 0.3 - greedy",
        _of("moe", _gain(DEFAULT, GREEDY)),
        ("moe",),
        "table 7",
    ),
    Claim(
        "More experts in the strong pass help further",
        "accuracy in percent: stronger self-contrast - self-contrast",
        _of("moe", _gain(STRONGER, CONTRAST)),
        ("moe",),
        "table 2",
    ),
    *(
        Claim(
            f"Self-contrast beats {name}",
            f"accuracy in percent: self-contrast - {name}",
            _of("moe", _gain(CONTRAST, method)),
            ("moe",),
            "table 1",
        )
        for method, name in (
            (ENSEMBLE, "another number of experts"),
            (DYNAMIC, "dynamic routing"),
            (SEARCH, "contrastive search"),
            (DOLA, "DoLa"),
            (AMATEUR, "contrastive decoding with an amateur"),
        )
    ),
    Claim(
        "Votes over samples beat greedy decoding",
        "accuracy in percent: vote over all plain samples - greedy",
        _of("moe", lambda of: _most_votes(of, PLAIN) - of[f"accuracy.{GREEDY}"]),
        ("moe",),
        "section 4.3",
    ),
    Claim(
        "and samples with self-contrast make better votes",
        "accuracy in percent of votes over all samples: self-contrast - plain",
        _of("moe", lambda of: _most_votes(of, CONTRASTED) - _most_votes(of, PLAIN)),
        ("moe",),
        "section 4.3",
    ),
    Claim(
        "With beta 0, with alpha 1, and with a weak pass like the strong one, texts are greedy's",
        "least percentage of equal texts - 99.9",
        _of("moe", lambda of: min(of["same.beta_0"], of["same.alpha_1"], of["same.weak_is_strong"]) - 99.9),
        ("moe",),
        "equations 5 and 6",
    ),
    Claim(
        "Both plans give the same texts",
        "percentage of equal texts - 99.9",
        _of("moe", lambda of: of["same.plans"] - 99.9),
        ("moe",),
        "ours",
    ),
    Claim(
        "Two rows of a batch are faster than two passes",
        "time as a multiple of greedy's: two passes - two rows",
        _of("moe", lambda of: of[f"latency.{TWO_PASSES}"] - of[f"latency.{CONTRAST}"]),
        ("moe",),
        "ours",
    ),
    Claim(
        "Self-contrast costs less than twice the time",
        "2 - time as a multiple of greedy's",
        _of("moe", lambda of: 2 - of[f"latency.{CONTRAST}"]),
        ("moe",),
        "table 3: 1.30; our bar",
    ),
    Claim(
        "Fine experts: the trained number is the best, within 2 points",
        "accuracy in percent: trained number + 2 - best number",
        _of("fine", lambda of: _trained_less_best(of) + 2),
        ("fine",),
        "our bar",
    ),
    Claim(
        "Fine experts: fewer of them as the weak pass beat greedy decoding",
        "accuracy in percent: self-contrast with 1, 2 or 3 experts - greedy",
        _of("fine", _gain(CONTRAST, GREEDY)),
        ("fine",),
        "table 4",
    ),
    Claim(
        "Fine experts: the lower the rank, the further its pass",
        "rank correlation of KL with the rank - 0.7",
        _of("fine", lambda of: rank_correlation(_by_rank(of, "kl")) - 0.7),
        ("fine",),
        "our bar",
    ),
)


def _most_votes(of: Numbers, way: str) -> float:
    prefix = f"majority.{way}."
    return of[prefix + str(max(int(name.removeprefix(prefix)) for name in of if name.startswith(prefix)))]


EXPERIMENT = Experiment(
    name="scmoe",
    module=__name__,
    title="SCMoE: a model against its own weak routing",
    paper="SCMoE, [arXiv 2405.14507](https://arxiv.org/abs/2405.14507)",
    question="Does a model answer better if a weak routing of its own is set against the trained one, and how do they differ?",
    arms={
        "moe": Arm("8 experts, top 2, weights normalised, as in Mixtral; or the model that a user brings"),
        "fine": Arm("30 experts of a quarter, top 6, beside 2 shared ones, weights not normalised, as in DeepSeekMoE"),
    },
    control="moe",
    measure=measure,
    measure_given=measure_given,
    options=MeasureOptions,
    columns={
        f"accuracy.{GREEDY}": Column("greedy, %", 1),
        f"accuracy.{DEFAULT}": Column("self-contrast, fixed setting, %", 1),
        f"accuracy.{CONTRAST}": Column("self-contrast, %", 1),
        "amateur": Column("amateur, greedy, %", 1),
        "kl.rank=2": Column("KL of rank 2, nats", 2),
        "unchosen.rank=2": Column("unchosen of rank 2, %", 1),
        f"latency.{CONTRAST}": Column("time of self-contrast / greedy", 2),
    },
    claims=CLAIMS,
    notes=(
        "In size `cpu`, the passes are apart as the paper says. With every seed the trained number of experts is the best or within "
        "half a point of it, and all experts at once are about as bad as a single one. Rank 1 is near the trained routing, all "
        "others far away, and the shares of unchosen experts come close to table 6. Only that passes differ more at expressions "
        "does not show.",
        "Nothing is gained by setting the passes against each other: self-contrast makes more right answers wrong than wrong ones "
        "right, the more so at larger beta and with more experts in the strong pass. The other decodings don't gain either: "
        "contrastive search is half a point ahead of greedy decoding (p above 0.6), all others and votes are behind. That was "
        "expected: the paper's models are 9,000 and 27,000 times as large, and a second expert alone is here far from any answer, at 4 nats. "
        "The paper chose the best setting of each method on the test set itself; here it is chosen on a development split and "
        "the test split is used once, so methods with large grids are not favoured.",
        "Models have learned problems in part: orders are near chance, comparisons are mostly right even where a sum is wrong, and how "
        "well sums go after 1,500 steps depends on the seed, as they are learned suddenly.",
        "Weak passes read the whole text, prompt included, with their own routing in every layer, and so have hidden states and "
        "caches of their own. *Unchosen* compares the picks of the weak pass with those that the strong pass makes at the same "
        "token with its hidden states: rank 2 may then be one of the strong pass's experts.",
        "KL is in nats for a token, along the answers that greedy decoding gives. The paper's table 5 has values of 1e-5, which "
        "are likely means over the vocabulary; only the order can be compared.",
        "No problem of the test or development split is a training problem in other words: sums are held out by what is computed. An "
        "answer counts where it is the right one after `#`; solutions without an answer are wrong.",
        "McNemar's exact test is paired by problem, over all seeds together; seeds share the test problems.",
        "The second model of contrastive decoding is the arm itself after 550 of 1,500 steps, with the same tokenizer; the "
        "paper's is a dense model that was trained apart.",
        "Other work ran on the machine while models were trained and asked; in a trial without it a process trained at about 15,000 "
        "tokens/s.",
        "DoLa finds one earlier layer in models of two, so that its low and high layers are the same.",
        "Times are medians of ratios to greedy decoding in the same repeat, through `generate` of transformers with plain "
        "kernels, batch 1, prompt included. Those of size `cpu` were taken by themselves, on an otherwise idle machine, after "
        "all answers; [the benchmark](../benchmarks/self-contrast.md) has a larger model, the fast path and the floor that memory "
        "traffic sets.",
    ),
    panel=panel,
    sections=SECTIONS,
)
