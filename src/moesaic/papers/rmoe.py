"""RMoE: does a recurrent link between the routers of consecutive layers change and improve routing?

Arms and measures of arXiv 2408.06793, sections 4 and 5 and appendix A.4, at a small size and full depth: the paper's own
gain is nil at 6 layers and 0.6 % at 12.
"""

from __future__ import annotations

import math
import statistics
from typing import Any

from transformers import PreTrainedModel

from moesaic.hf import MoesaicForCausalLM
from moesaic.papers.claims import Claim, Measured, higher, lower
from moesaic.papers.experiment import Arm, Column, Experiment, Trained
from moesaic.papers.measure import balance, layer_pairs, scores_by_layer, trace
from moesaic.trace import cross_layer_information, expert_similarity, gate_entropy, inner_balance, outer_balance
from moesaic.train import build_model
from moesaic.train.objective import language_model_objective, model_inputs, predicted_tokens
from moesaic.train.rng import seed_all

SCORED_TOKENS = 1024
"""Tokens of each domain whose scores are compared between layers."""


def measure(trained: Trained) -> dict[str, float]:
    """Bits for a byte, information between layers before and after training, and the balance of the gates."""
    found = balance(trace(trained))
    assert isinstance(trained.model, MoesaicForCausalLM)
    scores = scores_by_layer(trained, SCORED_TOKENS)
    picks = next(iter(trained.model.moe_blocks().values())).gate.top_k
    found["cross_layer_information"] = _cross_layer(trained)
    found["cross_layer_information.start"] = _cross_layer(_untrained(trained))
    found["gate_entropy"] = statistics.fmean(map(gate_entropy, scores.values()))
    found["inner_balance"] = statistics.median(map(inner_balance, scores.values()))
    found["outer_balance"] = statistics.median(outer_balance(scores_TN, picks) for scores_TN in scores.values())
    found["expert_similarity"] = statistics.fmean(_similarities(trained.model))
    found["router_gradient.lowest"], found["router_gradient.highest"] = _router_gradients(trained)
    return found


def _cross_layer(trained: Trained) -> float:
    """Mean over all pairs of layers."""
    scores = scores_by_layer(trained, SCORED_TOKENS)
    return statistics.fmean(cross_layer_information(scores[low], scores[high]) for low, high in layer_pairs(scores))


def _untrained(trained: Trained) -> Trained:
    """The same arm at step 0."""
    seed_all(trained.run.train.seed)
    model = build_model(trained.run, trained.data.tokenizer).to(trained.model.device).eval()  # pyright: ignore[reportArgumentType]
    return Trained(trained.arm, trained.run, model, trained.data)


def _similarities(model: MoesaicForCausalLM) -> list[float]:
    """Of the experts of each layer."""
    weights = [block.experts.state_dict() for block in model.moe_blocks().values()]
    first = "gate_up_proj" if "gate_up_proj" in weights[0] else "up_proj"
    return [expert_similarity(tensors[first], tensors["down_proj"]) for tensors in weights]


def _router_gradients(trained: Trained) -> tuple[float, float]:
    """Gradient norm of what reads the hidden states in the routers of the lower and the upper third of the layers."""
    model: PreTrainedModel = trained.model
    batches = [found[0] for found in trained.data.validation_batches().values()]
    model.train()
    items = predicted_tokens(batches)
    for batch in batches:
        language_model_objective(model, model_inputs(batch, model.device), items).loss.backward()
    assert isinstance(model, MoesaicForCausalLM)
    norms = []
    for block in model.moe_blocks().values():
        width = model.config.get_text_config().hidden_size
        readers = [tensor for tensor in block.gate.parameters() if tensor.ndim == 2 and tensor.shape[1] == width]
        norms.append(math.sqrt(sum(float(tensor.grad.square().sum()) for tensor in readers if tensor.grad is not None)))
    model.zero_grad(set_to_none=True)
    model.eval()
    third = max(1, len(norms) // 3)
    return statistics.fmean(norms[:third]), statistics.fmean(norms[-third:])


def _panel(axes: Any, seeds: list[Measured]) -> None:
    """Information between layers against loss, before and after training."""
    for arm in seeds[0]:
        points = [(seed[arm]["cross_layer_information"], seed[arm]["loss"] / math.log(2)) for seed in seeds]
        axes.scatter(*zip(*points, strict=True), label=arm, s=18)
    axes.set(xlabel="information between layers (nats)", ylabel="bits for a byte", title="Routing and loss")
    axes.legend(frameon=False, fontsize=8)


EXPERIMENT = Experiment(
    name="rmoe",
    module=__name__,
    title="RMoE: routers joined over layers by a recurrent cell",
    paper="RMoE, [arXiv 2408.06793](https://arxiv.org/abs/2408.06793)",
    question="Does a recurrent link between the routers of consecutive layers change routing, and does it lower the loss?",
    arms={
        "smoe": Arm("a linear router in each layer"),
        "rmoe": Arm("a GRU over layers, shared, with gradients through it"),
        "no_passing": Arm("the same modules, each layer from a state of zeros"),
        "learned_start": Arm("the same, each layer from one learned state: a control of the same size in use"),
        "detached": Arm("the state passed on without gradient"),
        "mlp": Arm("a two-layer router with as many parameters"),
    },
    control="smoe",
    measure=measure,
    columns={
        "cross_layer_information": Column("information between layers, nats", 3),
        "cross_layer_information.start": Column("before training", 3),
        "inner_balance": Column("best over second", 2),
        "outer_balance": Column("share of the picks", 3),
        "gate_entropy": Column("gate entropy, nats", 3),
        "max_violation": Column("MaxVio", 2),
        "expert_similarity": Column("expert similarity", 3),
        "router_gradient.lowest": Column("router gradient, lower third", 4),
        "router_gradient.highest": Column("upper third", 4),
    },
    claims=(
        Claim(
            "Passing the state raises the information between layers",
            "information(rmoe) - information(no_passing)",
            higher("rmoe", "no_passing", "cross_layer_information"),
            ("rmoe", "no_passing"),
            "figure 3",
        ),
        Claim(
            "The cell alone does not lower it",
            "information(no_passing) - information(smoe)",
            higher("no_passing", "smoe", "cross_layer_information"),
            ("no_passing", "smoe"),
            "figure 3",
        ),
        Claim(
            "Gates are less peaked",
            "best over second score: smoe - rmoe",
            lower("rmoe", "smoe", "inner_balance"),
            ("rmoe", "smoe"),
            "table 8",
        ),
        Claim(
            "The picks hold less of the scores",
            "share of the picks: smoe - rmoe",
            lower("rmoe", "smoe", "outer_balance"),
            ("rmoe", "smoe"),
            "table 8",
        ),
        Claim(
            "The loss is not above the linear router's by more than 0.3 %",
            "1.003 loss(smoe) - loss(rmoe)",
            lambda seed: 1.003 * seed["smoe"]["loss"] - seed["rmoe"]["loss"],
            ("smoe", "rmoe"),
            "table 1",
        ),
        Claim("The loss is lower", "loss(smoe) - loss(rmoe)", lower("rmoe", "smoe"), ("smoe", "rmoe"), "table 1"),
        Claim(
            "Gradients through the state matter",
            "loss(detached) - loss(rmoe)",
            lower("rmoe", "detached"),
            ("detached", "rmoe"),
            "table 4",
        ),
        Claim(
            "It is not just a bigger router",
            "loss(mlp) - loss(rmoe)",
            lower("rmoe", "mlp"),
            ("mlp", "rmoe"),
            "table 1",
        ),
        Claim(
            "Experts become less alike",
            "expert similarity: smoe - rmoe",
            lower("rmoe", "smoe", "expert_similarity"),
            ("smoe", "rmoe"),
            "section 5; appendix A.4.3",
        ),
    ),
    notes=(
        "A token is a byte: the loss over log 2 is bits for a byte (BPC). The backbone is a pre-norm llama, the paper's "
        "enwik8 models are post-norm with relative positions.",
        "The paper's gain is 0.6 % of the loss at 12 layers after 80,000 steps, and nil at 6 layers: at this size no visible "
        "gain is expected, and the claims on routing are the robust ones.",
        "`no_passing` has the same parameters as `rmoe`, but the cell's weights for the state are dead in it; "
        "`learned_start` is the fairer control.",
        "Information between layers compares expert i of one layer with expert i of another, and is biased upwards for few "
        "experts: it only ranks the arms.",
    ),
    panel=_panel,
)
