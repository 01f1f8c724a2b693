"""How alike the experts of a layer are, by their weights and by what they compute."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from moesaic.errors import ConfigError
from moesaic.trace.metrics.result import MetricResult


@torch.no_grad()
def weight_similarity(
    gate_up_NHD: Tensor,
    down_NDF: Tensor,
    *,
    over: Literal["mean", "all"] = "mean",
    layer: int = -1,
    top_k: int = 1,
) -> MetricResult:
    """Cosine of the weights of each pair of experts.

    "mean" averages every matrix over the hidden axis F and scales it to length 1 before they are joined (RMoE, arXiv
    2408.06793, appendix A.4.3), so the order of an expert's hidden units does not matter; "all" compares all weights,
    for experts that were copied from one and have hidden units in one order. The matrix holds the cosines, NaN on the
    diagonal; the value is their mean. 1: all experts are equal; the reference is 0, unrelated ones.

    Args:
        gate_up_NHD: first projections, H = F, 2F (gated) or 3F (double-gated).
        down_NDF: down projections.
        over: see above.
        layer: for the result.
        top_k: for the result.
    """
    if over not in ("mean", "all"):
        raise ConfigError("over", over, "is not one of the choices", "choose 'mean' or 'all'")
    parts = _matrices(gate_up_NHD, down_NDF)
    if over == "mean":
        parts = [nn.functional.normalize(part_NFD.mean(1), dim=-1) for part_NFD in parts]
    joined_NR = torch.cat([part.flatten(1) for part in parts], dim=-1)
    cosine_NN = nn.functional.normalize(joined_NR, dim=-1) @ nn.functional.normalize(joined_NR, dim=-1).T
    return _pairs(f"weight_similarity_{over}", cosine_NN, layer, top_k, {"over": over, "matrices": len(parts)})


@torch.no_grad()
def expert_similarity(gate_up_NHD: Tensor, down_NDF: Tensor) -> float:
    """How alike the experts of a layer are, as RMoE counts it (arXiv 2408.06793, appendix A.4.3).

    Each matrix of an expert is averaged over its hidden axis and scaled to length 1; the pieces are joined, and the dot
    products of all pairs of experts averaged, pairs of one expert with itself included. With R matrices (3 for gated
    experts) equal experts give R, and unrelated ones R / N.

    Args:
        gate_up_NHD: first projections, H = F, 2F (gated) or 3F (double-gated).
        down_NDF: down projections.
    """
    parts = [nn.functional.normalize(part_NFD.mean(1), dim=-1) for part_NFD in _matrices(gate_up_NHD, down_NDF)]
    joined_NR = torch.cat(parts, dim=-1)
    return float((joined_NR @ joined_NR.T).mean())


def _matrices(gate_up_NHD: Tensor, down_NDF: Tensor) -> list[Tensor]:
    """The matrices of every expert, float64 (N, F, D) each."""
    return [*gate_up_NHD.double().split(down_NDF.shape[-1], dim=1), down_NDF.double().mT]


@torch.no_grad()
def expert_outputs(experts: nn.Module, x_TD: Tensor, *, num_experts: int | None = None) -> Tensor:
    """What every expert computes of the same hidden states, (N, T, D), each alone and with weight 1.

    Args:
        experts: the experts of a layer, ours or of transformers: called with hidden states, indices and weights.
        x_TD: a sample of hidden states, as the layer gets them; a few hundred are enough. See `hidden_states`.
        num_experts: N; read from `experts.num_experts` if not given.
    """
    count = int(num_experts if num_experts is not None else experts.num_experts)  # pyright: ignore[reportArgumentType]
    index_T1 = torch.zeros(len(x_TD), 1, dtype=torch.int64, device=x_TD.device)
    weight_T1 = torch.ones(len(x_TD), 1, dtype=x_TD.dtype, device=x_TD.device)
    return torch.stack([experts(x_TD, index_T1 + expert, weight_T1) for expert in range(count)])


@torch.no_grad()
def output_similarity(
    y_NTD: Tensor,
    *,
    measure: Literal["cosine", "cka"] = "cosine",
    layer: int = -1,
    top_k: int = 1,
) -> MetricResult:
    """How alike the outputs of each pair of experts for the same hidden states are.

    "cosine": mean over tokens of y_i y_j / (|y_i| |y_j|). 1 where experts compute the same up to scale; 0 for unrelated
    ones, the reference. "cka": linear centred kernel alignment, |Y_i' Y_j|^2 / (|Y_i' Y_i| |Y_j' Y_j|) with columns
    centred over tokens (Kornblith et al., arXiv 1905.00414): also 1 where outputs are rotations of each other. It is
    biased upwards for fewer tokens than dimensions. The matrix holds the pairs, NaN on the diagonal and for experts
    whose output is 0; the value is their mean.

    Args:
        y_NTD: from `expert_outputs`.
        measure: see above.
        layer: for the result.
        top_k: for the result.
    """
    y_NTD = y_NTD.double()
    if measure == "cosine":
        y_NTD = nn.functional.normalize(y_NTD, dim=-1)
        some_NT = (y_NTD != 0).any(-1).double()
        both_NN = some_NT @ some_NT.T
        similarity_NN = torch.einsum("atd,btd->ab", y_NTD, y_NTD) / both_NN.where(both_NN > 0, math.nan)
    elif measure == "cka":
        y_NTD = y_NTD - y_NTD.mean(1, keepdim=True)
        # |A' B|^2 = sum over tokens of the product of their kernels, which needs no D x D matrix for each pair.
        kernel_NTT = y_NTD @ y_NTD.mT
        inner_NN = torch.einsum("ats,bts->ab", kernel_NTT, kernel_NTT)
        norm_N = inner_NN.diagonal().sqrt()
        scale_NN = norm_N.unsqueeze(-1) * norm_N
        similarity_NN = inner_NN / scale_NN.where(scale_NN > 0, math.nan)
    else:
        raise ConfigError("measure", measure, "is not one of the choices", "choose 'cosine' or 'cka'")
    return _pairs(f"output_similarity_{measure}", similarity_NN, layer, top_k, {"measure": measure})


class hidden_states:
    """Keep a sample of the hidden states that a module gets, while the block runs.

        with hidden_states(block.experts, 512) as sample:
            model(input_ids)
        y_NTD = expert_outputs(block.experts, sample.x_TD)

    Args:
        module: the experts of a layer.
        most: tokens to keep at most; the first ones.
    """

    def __init__(self, module: nn.Module, most: int = 512) -> None:
        self._module, self._most = module, most
        self._parts: list[Tensor] = []

    def __enter__(self) -> hidden_states:
        self._handle = self._module.register_forward_pre_hook(self._keep)
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()

    @property
    def x_TD(self) -> Tensor:
        """The sample.

        Raises:
            ConfigError: if the module did not run.
        """
        if not self._parts:
            raise ConfigError("module", type(self._module).__name__, "did not run", "run the model inside the block")
        return torch.cat(self._parts)

    def _keep(self, module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        missing = self._most - sum(map(len, self._parts))
        if missing > 0:
            self._parts.append(arguments[0].detach().flatten(0, -2)[:missing].clone())


def _pairs(metric: str, similarity_NN: Tensor, layer: int, top_k: int, conventions: dict) -> MetricResult:
    matrix_NN = similarity_NN.cpu().clone().fill_diagonal_(math.nan)
    size = len(matrix_NN)
    most_N = matrix_NN.nan_to_num(-math.inf).amax(-1)
    unknown_N = most_N == -math.inf
    return MetricResult(
        metric=metric,
        layer=layer,
        value=float(matrix_NN.nanmean()),
        top_k=top_k,
        num_columns=size,
        reference=0.0,
        table={
            "label": torch.arange(size),
            "value": matrix_NN.nanmean(-1),
            "most": most_N.masked_fill(unknown_N, math.nan),
            "partner": matrix_NN.nan_to_num(-math.inf).argmax(-1).masked_fill(unknown_N, -1),
        },
        matrix_GM=matrix_NN,
        conventions=conventions,
    )
