"""Noisy top-k gating: Gaussian noise on the logits while training, so that experts near the threshold get their turn."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn

from moesaic.errors import ConfigError
from moesaic.layer.noise import normal
from moesaic.layer.record import Routing, RoutingContext
from moesaic.layer.routers.base import BaseRouterConfig, Dependence, Router, check_top_k
from moesaic.layer.routers.parts.inputs import linear
from moesaic.layer.routers.scores import at, softmax_over, top_k


class NoisyTopKConfig(BaseRouterConfig):
    """Fields of noisy top-k gating.

    The defaults are those of Shazeer et al. (arXiv 1701.06538, eq. 3-5): H = x W_g + n * softplus(x W_noise) with n a
    standard normal number for each token and expert; the K largest of H are kept and softmax is taken over them. There
    is no noise in evaluation. V-MoE (arXiv 2106.05974, section 2 and its released code) has `noise: fixed` and
    `softmax_over: all`.

    Attributes:
        top_k: experts for each token (K).
        noise: the standard deviation is "learned", a softplus of a linear map of the token, or "fixed" to 1 / N.
        noise_scale: multiplies the standard deviation.
        noise_epsilon: added to the softplus; keeps the learned noise from dying out (1e-2 in tensor2tensor).
        softmax_over: the "selected" logits after selection, or "all" before it (V-MoE), where weights sum to less
            than 1. "selected" needs two picks: the softmax of one logit is 1, whatever the router says.
        stable_ties: equal logits go to the lower index; otherwise the device decides.
    """

    type: Literal["noisy_top_k"] = "noisy_top_k"
    top_k: PositiveInt
    noise: Literal["learned", "fixed"] = "learned"
    noise_scale: float = Field(default=1.0, gt=0)
    noise_epsilon: float = Field(default=0.0, ge=0)
    softmax_over: Literal["all", "selected"] = "selected"
    stable_ties: bool = True

    @model_validator(mode="after")
    def _consistent(self) -> NoisyTopKConfig:
        if self.top_k == 1 and self.softmax_over == "selected":
            raise ConfigError(
                "top_k",
                1,
                "gives the only pick weight 1, so that the language-model loss can't teach the router",
                "choose 2 or more, or set softmax_over: all",
            )
        if self.noise == "fixed" and self.noise_epsilon:
            raise ConfigError(
                "noise_epsilon", self.noise_epsilon, "has no effect on fixed noise", "leave it out or use noise_scale"
            )
        return self

    def depends_on(self, training: bool) -> frozenset[Dependence]:
        return frozenset({"random_numbers"} if training else ())

    @property
    def has_smooth_load(self) -> bool:
        return True

    def check(self, num_experts: int) -> None:
        check_top_k(self.top_k, num_experts)

    def build(self, hidden_size: int, num_experts: int) -> NoisyTopKRouter:
        self.check(num_experts)
        return NoisyTopKRouter(self, hidden_size, num_experts)


class NoisyTopKRouter(Router[NoisyTopKConfig]):
    """Linear logits, noise with a standard deviation for each token and expert, and the K largest sums.

    The record holds the clean logits and their softmax over all experts, as V-MoE's importance loss reads them; weights
    come from the noisy ones, which stand in `selection_TN`. `load_TN` holds `smooth_load` while training and, without
    noise, 1 for picked experts and 0 for others.

    Parameters are `weight` (N, D) and, for learned noise, `noise_weight` (N, D). With learned noise both start at zero:
    no signal, some noise (arXiv 1701.06538, appendix A).
    """

    def __init__(self, config: NoisyTopKConfig, hidden_size: int, num_experts: int) -> None:
        super().__init__(config, num_experts, config.top_k)
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        learned = config.noise == "learned"
        self.noise_weight = nn.Parameter(torch.empty(num_experts, hidden_size)) if learned else None
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02) -> None:
        if self.noise_weight is None:
            nn.init.normal_(self.weight, std=std)
            return
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.noise_weight)

    def forward(self, x_TD: Tensor, context: RoutingContext | None = None) -> Routing:
        config = self.config
        clean_TN = linear(x_TD, self.weight)
        std_TN = self._std(x_TD, clean_TN)
        noisy_TN = clean_TN
        if self.training:
            noisy_TN = clean_TN + std_TN * normal(context, self.layer, clean_TN.shape, stream=0, like=clean_TN)
        index_TK = top_k(noisy_TN.detach(), config.top_k, stable=config.stable_ties)
        if self.training:
            load_TN = smooth_load(clean_TN, noisy_TN, std_TN, config.top_k)
        else:
            load_TN = torch.zeros_like(clean_TN).scatter(-1, index_TK, 1.0)
        return Routing(
            index_TK=index_TK,
            weight_TK=self._weights(noisy_TN, index_TK),
            logits_TN=clean_TN,
            scores_TN=clean_TN.softmax(-1),
            selection_TN=noisy_TN.detach(),
            load_TN=load_TN,
            basis_TN=noisy_TN if self.training else None,
        )

    def _weigh(self, routing: Routing, index_TK: Tensor, kept_TK: Tensor) -> Tensor:
        noisy_TN = routing.logits_TN if routing.basis_TN is None else routing.basis_TN
        return self._weights(noisy_TN, index_TK, kept_TK)

    def _weights(self, noisy_TN: Tensor, index_TK: Tensor, kept_TK: Tensor | None = None) -> Tensor:
        if self.config.softmax_over == "selected":
            return softmax_over(noisy_TN.gather(-1, index_TK), kept_TK)
        return at(noisy_TN.softmax(-1), index_TK, kept_TK)

    def _std(self, x_TD: Tensor, clean_TN: Tensor) -> Tensor:
        config = self.config
        if self.noise_weight is None:
            return torch.full_like(clean_TN, config.noise_scale / self.num_experts)
        return config.noise_scale * (F.softplus(linear(x_TD, self.noise_weight)) + config.noise_epsilon)


def smooth_load(clean_TN: Tensor, noisy_TN: Tensor, std_TN: Tensor, k: int) -> Tensor:
    """Probability that each expert is among the K best when its own noise is drawn again and the others' stays.

    Phi((clean_i - the k-th largest of noisy without i) / std_i), with Phi the normal distribution function
    (arXiv 1701.06538, eq. 9). Differentiable in all three tensors, the threshold included, as in the reference code
    of tensor2tensor. Its sum over tokens is the smooth count that the load loss balances.

    Args:
        clean_TN: logits without noise.
        noisy_TN: logits with the noise that was drawn.
        std_TN: standard deviation of each expert's noise, 0 or more.
        k: number of picks; with k = N every expert is always picked.
    """
    if k >= noisy_TN.shape[-1]:
        return torch.ones_like(clean_TN)
    best = noisy_TN.topk(k + 1, dim=-1).values
    kth_T1, next_T1 = best[..., k - 1 : k], best[..., k : k + 1]
    # Without i, the k-th largest is the (k+1)-th of all if i is among the k best, else the k-th of all.
    threshold_TN = torch.where(noisy_TN > next_T1, next_T1, kth_T1)
    # Below this the probability is 0 or 1 anyway, and gradients would be 0 times infinity.
    std_TN = std_TN.clamp(min=torch.finfo(std_TN.dtype).eps)
    return torch.special.ndtr((clean_TN - threshold_TN) / std_TN)
