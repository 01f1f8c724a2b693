"""Modality banks: isolation, one router a bank, parity with ERNIE 4.5 VL, balance losses, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.ernie4_5_vl_moe.configuration_ernie4_5_vl_moe import Ernie4_5_VLMoeTextConfig
from transformers.models.ernie4_5_vl_moe.modeling_ernie4_5_vl_moe import Ernie4_5_VLMoeMoeTopKRouter

from moesaic.errors import ConfigError
from moesaic.layer import LoadBalancing, ModalityConfig, ModalityRouter, Routing, RoutingContext, TopKConfig, ZLoss

D, T = 4, 60


def make_router(**fields: Any) -> ModalityRouter:
    config = ModalityConfig.from_dict({"banks": [3, 5], "top_k": 2, **fields})
    router = config.build(D, sum(config.banks) + config.shared).double()
    generator = torch.Generator().manual_seed(0)
    for tensor in (*router.parameters(), *router.buffers()):
        tensor.data.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64))
    return router


def tokens() -> Tensor:
    return torch.randn(T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


MODALITY_T = torch.randint(2, (T,), generator=torch.Generator().manual_seed(2))


def route(router: ModalityRouter, x_TD: Tensor, modality_T: Tensor = MODALITY_T, **context: Any) -> Routing:
    return router(x_TD, RoutingContext(modality_T=modality_T, **context))


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid", "sqrt_softplus"])
def test_each_bank_is_a_router_of_its_own(score_function: str) -> None:
    """Without shared experts, each modality gets what a top-k router with its bank's rows gives it."""
    router, x_TD = make_router(score_function=score_function, normalize_top_k=True), tokens()
    routing = route(router, x_TD)
    for modality, (start, size) in enumerate([(0, 3), (3, 5)]):
        fields = {"top_k": 2, "score_function": score_function, "normalize_top_k": True}
        alone = TopKConfig.from_dict(fields).build(D, size).double()
        alone.weight.data.copy_(router.weight[start : start + size])
        mine_T = MODALITY_T.eq(modality)
        expected = alone(x_TD[mine_T])
        assert torch.equal(routing.index_TK[mine_T], expected.index_TK + start)
        torch.testing.assert_close(routing.weight_TK[mine_T], expected.weight_TK)
        scores_TN = routing.scores_TN[mine_T]
        torch.testing.assert_close(scores_TN[:, start : start + size], expected.scores_TN)
        assert scores_TN.count_nonzero() == mine_T.sum() * size


def test_shared_experts_are_open_to_all() -> None:
    """The slow way: sort the allowed experts of each token by score."""
    router, x_TD = make_router(banks=[1, 2, 1], shared=2, top_k=3, selection_bias=True), tokens()
    assert router.e_score_correction_bias is not None
    modality_T = torch.arange(T) % 3
    routing = route(router, x_TD, modality_T)
    allowed = [[0, 4, 5], [1, 2, 4, 5], [3, 4, 5]]
    for token in range(T):
        mine = allowed[modality_T[token]]
        logits = router.weight[mine] @ x_TD[token]
        biased = logits.softmax(0) + router.e_score_correction_bias[mine]
        order = biased.argsort(descending=True)[:3]
        assert routing.index_TK[token].tolist() == [mine[place] for place in order]
        torch.testing.assert_close(routing.weight_TK[token], logits.softmax(0)[order])


def test_banks_are_those_of_ernie_4_5_vl() -> None:
    """Its text and vision gates, side by side."""
    torch.manual_seed(0)
    config = Ernie4_5_VLMoeTextConfig(hidden_size=D)
    config.num_experts, config.num_experts_per_tok, config.moe_norm_min = 8, 3, 1e-12
    gates = [Ernie4_5_VLMoeMoeTopKRouter(config) for _ in range(2)]
    ours = ModalityConfig(
        banks=(8, 8), top_k=3, selection_bias=True, normalize_top_k=True, normalization_floor=1e-12
    ).build(D, 16)
    assert ours.e_score_correction_bias is not None
    for bank, gate in enumerate(gates):
        torch.nn.init.normal_(gate.weight)
        torch.nn.init.normal_(gate.moe_statics.e_score_correction_bias, std=0.1)
        rows = slice(8 * bank, 8 * bank + 8)
        ours.weight.data[rows] = gate.weight.data
        ours.e_score_correction_bias[rows] = gate.moe_statics.e_score_correction_bias.data.flatten()
    x_TD = tokens().float()
    routing = route(ours, x_TD)
    for bank, gate in enumerate(gates):
        mine_T = MODALITY_T.eq(bank)
        _, weight_TK, index_TK = gate(x_TD[mine_T])
        assert torch.equal(routing.index_TK[mine_T], index_TK + 8 * bank)
        torch.testing.assert_close(routing.weight_TK[mine_T], weight_TK)


def test_gradients_stay_in_the_bank_and_are_those_of_finite_differences() -> None:
    router, x_TD = make_router(normalize_top_k=True), tokens()[:6].requires_grad_()
    text_T = torch.zeros(6, dtype=torch.int64)
    assert torch.autograd.gradcheck(lambda x_TD: route(router, x_TD, text_T).weight_TK, x_TD)
    context = RoutingContext(modality_T=text_T)
    routing = router(x_TD, context)
    loss = routing.weight_TK.square().sum()
    for balance in (LoadBalancing(coefficient=1.0), ZLoss(coefficient=1.0)):
        loss = loss + balance.per_sequence(routing, context).sum()
    loss.backward()
    assert router.weight.grad is not None
    assert router.weight.grad[:3].all()
    assert not router.weight.grad[3:].any()


def test_z_loss_is_that_of_the_bank() -> None:
    router, x_TD, context = make_router(), tokens(), RoutingContext(modality_T=MODALITY_T)
    logits_TN = x_TD @ router.weight.T
    z_T = torch.where(MODALITY_T == 0, logits_TN[:, :3].logsumexp(-1), logits_TN[:, 3:].logsumexp(-1))
    loss_B = ZLoss(coefficient=1.0).per_sequence(router(x_TD, context), context)
    torch.testing.assert_close(loss_B, z_T.square().mean(0, keepdim=True))


def test_load_balancing_balances_inside_each_bank() -> None:
    """Trained by the loss alone, from collapsed banks to N * sum of q^2 / n: q of the tokens, n experts of a bank."""
    router = make_router(top_k=1)
    x_TD = torch.cat([tokens(), torch.ones(T, 1, dtype=torch.float64)], -1)
    router.weight = torch.nn.Parameter(torch.cat([0.1 * router.weight, torch.zeros(8, 1)], -1))
    router.weight.data[[0, 3], -1] = 2.0  # one expert of each bank takes nearly all
    modality_T = (torch.arange(T) % 4 == 0).long()
    context, loss = RoutingContext(modality_T=modality_T), LoadBalancing(coefficient=1.0)
    optimizer = torch.optim.Adam([router.weight], lr=0.02)
    values = []
    for _ in range(300):
        value = loss.per_sequence(router(x_TD, context), context).sum()
        values.append(value.item())
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    balanced = 8 * (0.75**2 / 3 + 0.25**2 / 5)
    assert values[0] > 1.3 * balanced
    assert values[-1] == pytest.approx(balanced, rel=0.05)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"banks": [3, 4]}, r"banks = \(3, 4\) and shared \(0\) hold 7 experts, not num_experts \(8\)"),
        ({"banks": [1, 6], "shared": 1, "top_k": 3}, r"top_k = 3 is larger than the smallest bank .* \(2\)"),
        ({"banks": []}, r"banks"),
        ({"normalization_floor": 1e-12}, r"normalize_top_k = False leaves the floor"),
    ],
)
def test_bad_config_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ModalityConfig.from_dict({"banks": [3, 5], "top_k": 2, **fields}).build(D, 8)


def test_unknown_modality_is_refused_unless_it_is_padding() -> None:
    router, x_TD = make_router(), tokens()[:3]
    modality_T = torch.tensor([0, 1, 2])
    with pytest.raises(ConfigError, match=r"modality = 2 is not in \[0, 2\); .* banks"):
        route(router, x_TD, modality_T)
    route(router, x_TD, modality_T, mask_T=torch.tensor([True, True, False]))
    with pytest.raises(ConfigError, match="modality = None is missing"):
        router(x_TD)
