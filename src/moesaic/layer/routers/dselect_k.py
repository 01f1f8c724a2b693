"""DSelect-k: a selection of k experts that is differentiable all the way, through binary codes of the experts."""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from moesaic.errors import ConfigError
from moesaic.layer.record import Routing, RoutingContext
from moesaic.layer.routers.base import BaseRouterConfig, Router, check_top_k
from moesaic.layer.routers.parts.inputs import linear
from moesaic.layer.routers.scores import at

# Mass on experts that exist, below which the reachability loss stops growing (and has no gradient anyway).
_LEAST_MASS = 1e-6
# Weights below this have its logarithm as logit; 0 would have none.
_LEAST_WEIGHT = 1e-30


class DSelectKConfig(BaseRouterConfig):
    """Fields of DSelect-k (arXiv 2106.03760, and its released code).

    Each of k selectors holds m = ceil(log2 N) numbers z. `smooth_step` of them are the bits of an expert's number, so
    that r(z)_i = product over bits of S(z_j) or 1 - S(z_j) is a distribution over experts, and one expert once all bits
    are 0 or 1. Weights are q = sum over selectors of softmax(alpha)_s r(z^s).

    Attributes:
        num_selectors: k; experts for each token once the selectors have decided. Before, up to all N run.
        gamma: width of the smooth step. A number beyond gamma / 2 has decided its bit, and gets no gradient.
        conditioned_on: the selectors are linear maps of the "token", or parameters that make all tokens take the same
            experts ("nothing", the paper's static gate).
    """

    type: Literal["dselect_k"] = "dselect_k"
    num_selectors: PositiveInt
    gamma: float = Field(default=1.0, gt=0)
    conditioned_on: Literal["token", "nothing"] = "token"

    @property
    def may_skip(self) -> bool:
        return True

    @property
    def provides(self) -> frozenset[str]:
        return frozenset({"selector_entropy", "unreachable"})

    @property
    def unranked(self) -> str | None:
        return "selectors name the experts, and all others have score 0"

    def check(self, num_experts: int) -> None:
        if num_experts < 2:
            raise ConfigError("type", self.type, f"needs two experts, not num_experts = {num_experts}", "use dense")
        try:
            check_top_k(self.num_selectors, num_experts)
        except ConfigError as error:
            raise ConfigError("num_selectors", error.value, error.problem, error.remedy) from None

    def build(self, hidden_size: int, num_experts: int) -> DSelectKRouter:
        self.check(num_experts)
        return DSelectKRouter(self, hidden_size, num_experts)


class DSelectKRouter(Router[DSelectKConfig]):
    """The record has N columns: experts by falling weight, then no expert for those whose weight is exactly 0.

    `scores_TN` are q, and `logits_TN` their logarithms. `auxiliary` holds "selector_entropy", the sum over selectors of
    the entropy of r, whose descent makes them decide, and "unreachable", the sum of 1 / (sum of r) - 1, which keeps
    selectors off codes that no expert has where N is not a power of 2.

    Parameters conditioned on the token are `selector_weight` (k m, D), `selector_bias` (k m,), `mixture_weight` (k, D)
    and `mixture_bias` (k,); else only `selector` (k m,) and `mixture` (k,).
    """

    def __init__(self, config: DSelectKConfig, hidden_size: int, num_experts: int) -> None:
        super().__init__(config, num_experts, num_experts)
        self.bits = math.ceil(math.log2(num_experts))
        selectors = config.num_selectors
        if config.conditioned_on == "token":
            self.selector_weight = nn.Parameter(torch.empty(selectors * self.bits, hidden_size))
            self.selector_bias = nn.Parameter(torch.empty(selectors * self.bits))
            self.mixture_weight = nn.Parameter(torch.empty(selectors, hidden_size))
            self.mixture_bias = nn.Parameter(torch.empty(selectors))
        else:
            self.selector = nn.Parameter(torch.empty(selectors * self.bits))
            self.mixture = nn.Parameter(torch.empty(selectors))
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02) -> None:
        """Near the middle of the smooth step, where every bit is open: uniform up to gamma / 100, as released."""
        for name, parameter in self.named_parameters():
            bound = self.config.gamma / 100 if name.startswith("selector") else 0.05
            nn.init.uniform_(parameter, -bound, bound)

    @property
    def picks(self) -> float:
        """Once the selectors have decided."""
        return self.config.num_selectors

    def forward(self, x_TD: Tensor, context: RoutingContext | None = None) -> Routing:
        selectors = self.config.num_selectors
        if self.config.conditioned_on == "token":
            z_TC = linear(x_TD, self.selector_weight, self.selector_bias)
            alpha_TS = linear(x_TD, self.mixture_weight, self.mixture_bias)
        else:
            precision = self.precision(x_TD)
            z_TC = self.selector.to(precision).expand(x_TD.shape[0], -1)
            alpha_TS = self.mixture.to(precision).expand(x_TD.shape[0], -1)
        r_TSN = select(z_TC.unflatten(-1, (selectors, self.bits)), self.num_experts, self.config.gamma)
        scores_TN = (alpha_TS.softmax(-1).unsqueeze(-1) * r_TSN).sum(-2)
        index_TK = scores_TN.detach().sort(dim=-1, descending=True, stable=True).indices
        weight_TK = scores_TN.gather(-1, index_TK)
        reached_TS = r_TSN.sum(-1).clamp(min=_LEAST_MASS)
        return Routing(
            index_TK=index_TK.masked_fill(weight_TK == 0, self.num_experts),
            weight_TK=weight_TK,
            logits_TN=scores_TN.clamp(min=_LEAST_WEIGHT).log(),
            scores_TN=scores_TN,
            selection_TN=scores_TN.detach(),
            ragged=True,
            auxiliary={"selector_entropy": _entropy(r_TSN).sum(-1), "unreachable": (1 / reached_TS - 1).sum(-1)},
        )

    def _weigh(self, routing: Routing, index_TK: Tensor, kept_TK: Tensor) -> Tensor:
        return at(routing.scores_TN, index_TK, kept_TK)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, num_selectors={self.config.num_selectors}"


def smooth_step(z: Tensor, gamma: float) -> Tensor:
    """0 up to -gamma / 2, 1 from gamma / 2 on, and the cubic -2 z^3 / gamma^3 + 3 z / (2 gamma) + 1/2 between."""
    z = z.clamp(-gamma / 2, gamma / 2)
    # The clamp keeps the ends exact: rounding of the cubic would leave experts with tiny weights running.
    inside = -2 * (z / gamma) ** 3 + 1.5 * (z / gamma) + 0.5
    return torch.where(z <= -gamma / 2, 0.0, torch.where(z >= gamma / 2, 1.0, inside))


def select(z_TSB: Tensor, num_experts: int, gamma: float) -> Tensor:
    """Distribution of each selector over the experts, (T, S, N), from the numbers behind the bits of the code.

    Expert i has the binary code of i, highest bit first. Its sum over experts is below 1 only where N is not a power
    of 2.
    """
    bits = z_TSB.shape[-1]
    experts_N = torch.arange(num_experts, device=z_TSB.device)
    places_B = torch.arange(bits - 1, -1, -1, device=z_TSB.device)
    code_NB = (experts_N.unsqueeze(-1) >> places_B) & 1
    step_TS1B = smooth_step(z_TSB, gamma).unsqueeze(-2)
    return torch.where(code_NB == 1, step_TS1B, 1 - step_TS1B).prod(-1)


def _entropy(r_TSN: Tensor) -> Tensor:
    """Entropy over experts; the logarithm has no derivative at 0, where the term is 0."""
    return -(r_TSN * r_TSN.clamp(min=_LEAST_WEIGHT).log()).sum(-1)
