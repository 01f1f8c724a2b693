"""AdaMoE: can a trained MoE learn to run fewer experts for some tokens without losing quality?

A top-2 model is trained (`pretrained`), then every arm starts from its checkpoint and sees the same further text: top-2 as it
is, with null experts and their annealed balance loss, and controls. After arXiv 2406.13233, sections 3 and 4 and appendix B;
training from random weights on text is ours, the paper fine-tunes.
"""

from __future__ import annotations

import statistics
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moesaic.hf import MoesaicForCausalLM
from moesaic.hf.transplant import respecify
from moesaic.layer import MoESpec
from moesaic.papers.claims import Claim, Measured, lower
from moesaic.papers.experiment import Arm, Column, Experiment, Forking, Trained
from moesaic.papers.measure import balance, contexts, loss, trace
from moesaic.trace import account
from moesaic.train import load_model
from moesaic.transform.add_null_experts import add_null_experts

RULE_KEEPERS, RULE_BREAKERS = ("m16k4", "m24k5", "m32k6"), ("m32k4", "m32k5")
"""Numbers of nulls and picks of the paper's table 2; those that break K = m / N + 2 fall behind there."""


def with_nulls(forking: Forking) -> None:
    """Null experts whose router rows are copies of the experts', so that the model computes what it did."""
    model, options = _load(forking), forking.options
    model = add_null_experts(model, options["num_null"], options.get("top_k"), exact="top_k" not in options)
    _save(forking, model, {**model.config.spec.router.to_dict(), **options.get("router", {})})


def as_it_is(forking: Forking) -> None:
    """The same routers."""
    model = _load(forking)
    _save(forking, model, model.config.spec.router.to_dict())


def random_skip(forking: Forking) -> None:
    """Top 2 whose second pick runs at random, as often as makes the load of the arm `adamoe`."""
    keep = min(max(forking.measured["adamoe"]["load"] - 1, 0.01), 0.99)
    _save(forking, _load(forking), {"type": "random_skip", "top_k": 2, "keep": keep})


def _load(forking: Forking) -> MoesaicForCausalLM:
    model = load_model(forking.checkpoint)
    assert isinstance(model, MoesaicForCausalLM)
    return model


def _save(forking: Forking, model: MoesaicForCausalLM, router: dict[str, Any]) -> None:
    """Save `model` with another router section and the balance losses of the arm; weights stay."""
    values = {**model.config.spec.to_dict(), "router": router, "balance": forking.options["balance"]}
    changed = respecify(model, MoESpec.from_dict(values, where="moe"), lambda block: dict(block.state_dict()))
    changed.save_pretrained(forking.folder)


def measure(trained: Trained) -> dict[str, float]:
    """Load (experts that a token runs) and its spread, FLOPs, load by frequency of the token, and the loss at step 0."""
    found = balance(trace(trained))
    counts = _counts(trained)
    found["load"] = statistics.fmean(float(count_T.mean()) for count_T, _ in counts.values())
    found["load_spread"] = statistics.fmean(float(count_T.std()) for count_T, _ in counts.values())
    found["flops"] = _flops(trained, found["load"])
    found["load.rare"], found["load.frequent"] = _load_by_frequency(counts)
    if trained.initial is not None:
        initial = load_model(trained.initial).to(trained.model.device).eval()  # pyright: ignore[reportArgumentType]
        found["start.loss"] = loss(Trained(trained.arm, trained.run, initial, trained.data))
    return found


def _counts(trained: Trained) -> dict[int, tuple[Tensor, Tensor]]:
    """By layer, for held-out tokens: how many experts each ran, and its id."""
    chunks: dict[int, list[tuple[Tensor, Tensor]]] = {}
    for context in contexts(trained):
        assert context.token_ids_T is not None
        mask_T = slice(None) if context.mask_T is None else context.mask_T
        for layer, routing in context.records.items():
            count_T = (routing.index_TK < routing.num_experts).sum(-1)[mask_T].double()
            chunks.setdefault(layer, []).append((count_T.cpu(), context.token_ids_T[mask_T].cpu()))
    return {
        layer: (torch.cat([count_T for count_T, _ in parts]), torch.cat([ids_T for _, ids_T in parts]))
        for layer, parts in chunks.items()
    }


def _flops(trained: Trained, load: float) -> float:
    """Million operations of a token's forward pass when it runs `load` experts a layer."""
    counted = account(trained.model, context_length=trained.run.data.sequence_length)
    routed = counted.parts["routed experts"]
    assert isinstance(trained.model, MoesaicForCausalLM)
    one_expert = routed.total / trained.model.config.spec.experts.num_experts
    return (counted.flops_per_token() + 2 * (load * one_expert - routed.active)) / 1e6


def _load_by_frequency(counts: dict[int, tuple[Tensor, Tensor]]) -> tuple[float, float]:
    """Mean load of the rarer and of the more frequent tokens, halves of the held-out text by how often a token occurs."""
    rare, frequent = [], []
    for count_T, ids_T in counts.values():
        order_T = torch.bincount(ids_T)[ids_T].argsort(stable=True)
        half = len(order_T) // 2
        rare.append(float(count_T[order_T[:half]].mean()))
        frequent.append(float(count_T[order_T[half:]].mean()))
    return statistics.fmean(rare), statistics.fmean(frequent)


def _panel(axes: Any, seeds: list[Measured]) -> None:
    """Loss over load of the arms that start from the trained top-2 model."""
    for arm in seeds[0]:
        if "start.loss" in seeds[0][arm]:
            points = [(seed[arm]["load"], seed[arm]["loss"]) for seed in seeds]
            axes.scatter(*zip(*points, strict=True), label=arm, s=18)
    axes.set(xlabel="experts run for a token and layer", ylabel="validation loss (nats)", title="Loss and load")
    axes.legend(frameon=False, fontsize=8)


_fork = partial(Arm, parent="pretrained")


EXPERIMENT = Experiment(
    name="adamoe",
    module=__name__,
    title="AdaMoE: null experts for a trained model",
    paper="AdaMoE, [arXiv 2406.13233](https://arxiv.org/abs/2406.13233)",
    question="Can a trained top-2 MoE learn to run fewer experts for some tokens without losing quality?",
    arms={
        "pretrained": Arm("8 experts, top 2: the stage before", compared=False),
        "top_2": _fork("top 2 as before", fork=as_it_is),
        "adamoe": _fork("8 nulls, top 3 of 16, rows copied; balance 0.02, from half time 0.0001", fork=with_nulls),
        "not_pooled": _fork("the same, but nulls balanced among each other", fork=with_nulls),
        "over_selected": _fork("the same, weights normalised over nulls too", fork=with_nulls),
        "random_skip": _fork(
            "top 2 whose second pick runs at random, as often as makes the load of `adamoe`",
            fork=random_skip,
            after=("adamoe",),
        ),
        "m16k4": _fork("16 nulls, top 4", fork=with_nulls),
        "m24k5": _fork("24 nulls, top 5", fork=with_nulls),
        "m32k6": _fork("32 nulls, top 6", fork=with_nulls),
        "m32k4": _fork("32 nulls, top 4: fewer picks than keep the outputs", fork=with_nulls),
        "m32k5": _fork("32 nulls, top 5: fewer picks than keep the outputs", fork=with_nulls),
    },
    control="top_2",
    measure=measure,
    columns={
        "load": Column("load", 3),
        "load_spread": Column("its spread over tokens", 3),
        "flops": Column("MFLOPs a token", 3),
        "load.rare": Column("load, rarer tokens", 3),
        "load.frequent": Column("load, frequent tokens", 3),
        "start.loss": Column("loss at the start"),
        "max_violation": Column("MaxVio of the experts", 2),
    },
    claims=(
        Claim(
            "Copied rows leave the model as it was",
            "0.001 - |loss at the start: adamoe - top_2|",
            lambda seed: 1e-3 - abs(seed["adamoe"]["start.loss"] - seed["top_2"]["start.loss"]),
            ("adamoe", "top_2"),
            "section 3.5",
        ),
        Claim(
            "The load falls below 1.8",
            "1.8 - load(adamoe)",
            lambda seed: 1.8 - seed["adamoe"]["load"],
            ("adamoe",),
            "table 1",
        ),
        Claim(
            "and stays above 1.3",
            "load(adamoe) - 1.3",
            lambda seed: seed["adamoe"]["load"] - 1.3,
            ("adamoe",),
            "table 1",
        ),
        Claim(
            "at a loss within 0.5 % of top 2",
            "1.005 loss(top_2) - loss(adamoe)",
            lambda seed: 1.005 * seed["top_2"]["loss"] - seed["adamoe"]["loss"],
            ("adamoe", "top_2"),
            "table 1, as accuracy",
        ),
        Claim(
            "Choosing whom to skip beats skipping at random",
            "loss(random_skip) - loss(adamoe)",
            lower("adamoe", "random_skip"),
            ("adamoe", "random_skip"),
            "our control",
        ),
        Claim(
            "Balancing nulls as one is better",
            "loss(not_pooled) - loss(adamoe)",
            lower("adamoe", "not_pooled"),
            ("adamoe", "not_pooled"),
            "table 3",
        ),
        Claim(
            "Normalising over experts alone is better",
            "loss(over_selected) - loss(adamoe)",
            lower("adamoe", "over_selected"),
            ("adamoe", "over_selected"),
            "table 4",
        ),
        Claim(
            "Tokens differ in load",
            "spread of the load over tokens(adamoe) - 0.3",
            lambda seed: seed["adamoe"]["load_spread"] - 0.3,
            ("adamoe",),
            "section 3.2",
        ),
        Claim(
            "Rarer tokens run more experts",
            "load of rarer - load of frequent tokens(adamoe)",
            lambda seed: seed["adamoe"]["load.rare"] - seed["adamoe"]["load.frequent"],
            ("adamoe",),
            "not in the paper",
        ),
        *(
            Claim(
                f"{name} stays within 0.5 % of top 2",
                f"1.005 loss(top_2) - loss({name})",
                lambda seed, name=name: 1.005 * seed["top_2"]["loss"] - seed[name]["loss"],
                ("top_2", name),
                "table 2",
            )
            for name in RULE_KEEPERS
        ),
        *(
            Claim(
                f"{name}, which changes the model at the start, falls behind m32k6",
                f"loss({name}) - loss(m32k6)",
                lower("m32k6", name),
                ("m32k6", name),
                "table 2",
            )
            for name in RULE_BREAKERS
        ),
    ),
    notes=(
        "Load is the number of experts that a token runs in a layer, mean over tokens and layers; top 2 has 2. At perfect "
        "balance 8 nulls and top 3 have 1.5.",
        "AdaMoE's balance loss is K times ours: its coefficient 0.02 with K = 3 is 0.06 in the file, and 0.0001 is 0.0003.",
        "All arms go on from one checkpoint per seed with a fresh optimiser, over text in the same order, another one than "
        "before.",
        "`random_skip` has the final load of `adamoe` from its first step, where `adamoe` begins at 2: it trains with fewer "
        "experts, and is evaluated with as many.",
        "The paper fine-tunes Mixtral and Llama on tasks and reports accuracy; next-token loss of small models trained from "
        "nothing is ours.",
    ),
    panel=_panel,
)
