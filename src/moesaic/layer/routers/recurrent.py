"""Routers of successive layers joined by one recurrent cell, which steps over depth and never over tokens (RMoE)."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn

from moesaic.errors import ConfigError
from moesaic.layer.record import Routing, RoutingContext
from moesaic.layer.routers.base import Router
from moesaic.layer.routers.parts.best_k import BestKConfig, BestKRouter
from moesaic.layer.routers.parts.cells import Cell, CellName
from moesaic.layer.routers.parts.unit_vectors import cosine, sharpness

# Of the cosine head: the temperature at the start and the bound of its inverse, as CosineConfig has them.
_TEMPERATURE, _MAX_SCALE = 0.3, 100.0


class RecurrentConfig(BestKConfig):
    """Fields of the layerwise recurrent router (arXiv 2408.06793, section 3 and appendix A).

    The defaults are those of the paper's enwik8 models, whose weights are renormalised over the picks. Its Llama models
    have `linear_bias: false` and `initialization: normal`.

    Attributes:
        state_size: P, the width of the state.
        cell: "gru", "rnn" with tanh, or "lstm", whose memory travels too.
        mode: what a layer starts from: the state that the layer below left ("full"); the same, without gradient
            ("detached"); zeros ("no_passing"), which leaves the cell's weight for the state unused; or one learned
            vector ("learned_start"), a fairer control of the same size.
        residual: alpha; the logits of the layer below times alpha are added to a layer's own. Layers must agree in N.
        detach_residual: keep gradients from flowing through that sum.
        accumulate_residual: what is added already holds what was added below; otherwise it is the own logits only.
        head: how logits come from the state: "linear", or "cosine", a cosine router (X-MoE, arXiv 2204.09179) that looks at
            the state instead of the token (table 2).
        head_size: width of the cosine head's projection; 16 by default, the paper has 8, 16 and 32.
        shared_projector: one projector for all layers instead of one for each.
        linear_bias: biases of projector and linear head.
        initialization: "torch", uniform as nn.Linear and nn.GRUCell start, or "normal" for all weights and all biases.
        freeze_head: take the head, with its bias, out of the training.
        freeze_cell: take the cell out of the training.
    """

    type: Literal["recurrent"] = "recurrent"
    normalize_top_k: bool = True
    state_size: PositiveInt = 128
    cell: CellName = "gru"
    mode: Literal["full", "detached", "no_passing", "learned_start"] = "full"
    residual: float = Field(default=0.0, ge=0)
    detach_residual: bool = False
    accumulate_residual: bool = False
    head: Literal["linear", "cosine"] = "linear"
    head_size: PositiveInt | None = None
    shared_projector: bool = False
    linear_bias: bool = True
    initialization: Literal["torch", "normal"] = "torch"
    freeze_head: bool = False
    freeze_cell: bool = False

    @model_validator(mode="after")
    def _fields_have_an_effect(self) -> RecurrentConfig:
        if self.head_size is not None and self.head != "cosine":
            raise ConfigError("head_size", self.head_size, "has no effect on a linear head", "set head: cosine")
        for field in ("detach_residual", "accumulate_residual"):
            if getattr(self, field) and not self.residual:
                raise ConfigError(field, True, "has no effect without residual", "set residual, to 0.5 or 1.0")
        return self

    @property
    def passes_state(self) -> bool:
        """Whether the cell starts from the state of the layer below."""
        return self.mode in ("full", "detached")

    @property
    def carries_state(self) -> bool:
        return self.passes_state or self.residual > 0

    def build(self, hidden_size: int, num_experts: int) -> RecurrentRouter:
        self.check(num_experts)
        return RecurrentRouter(self, hidden_size, num_experts)


class Projector(nn.Module):
    """P_i: hidden states to the cell's input. Parameters are `weight` (P, D) and `bias` (P,)."""

    def __init__(self, hidden_size: int, state_size: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(state_size, hidden_size))
        self.bias = nn.Parameter(torch.empty(state_size)) if bias else None

    def forward(self, x_TD: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x_TD.dtype)
        return F.linear(x_TD, self.weight.to(x_TD.dtype), bias)


class RecurrentRouter(BestKRouter[RecurrentConfig]):
    """u = P_i x; s_i = cell(u, s_{i-1}); logits = G_i s_i: the cell is all layers', the linear maps are each layer's.

    Parameters are `weight` (N, P) and `bias` (N,) of the head G_i, `projector` and `cell`. A cosine head has
    `projection_weight` (d, P), `weight` (N, d), the expert vectors, and `log_scale` (1,), as `CosineRouter` has. The
    record's `state` holds what the next layer reads: the cell's state, if it is passed on, and the logits, if there is a
    residual. It is a tensor in the graph, so it may be checkpointed; nothing is kept between forward passes.
    """

    def __init__(self, config: RecurrentConfig, hidden_size: int, num_experts: int) -> None:
        super().__init__(config, num_experts)
        self.projector = Projector(hidden_size, config.state_size, config.linear_bias)
        self.cell = Cell(config.cell, config.state_size, learned_start=config.mode == "learned_start")
        cosine_head = config.head == "cosine"
        width = (config.head_size or 16) if cosine_head else config.state_size
        self.projection_weight = nn.Parameter(torch.empty(width, config.state_size)) if cosine_head else None
        self.log_scale = nn.Parameter(torch.empty(1)) if cosine_head else None
        self.weight = nn.Parameter(torch.empty(num_experts, width))
        self.bias = nn.Parameter(torch.empty(num_experts)) if config.linear_bias and not cosine_head else None
        self.reset_parameters()
        self.freeze()

    def freeze(self) -> None:
        if self.config.freeze_head:
            for parameter in self.parameters(recurse=False):
                parameter.requires_grad_(False)
        if self.config.freeze_cell:
            self.cell.requires_grad_(False)

    def reset_parameters(self, std: float = 0.02) -> None:
        """As `RecurrentConfig.initialization` says; what was borrowed is its owner's to initialise."""
        normal = std if self.config.initialization == "normal" else None
        if "cell" in self._modules:
            self.cell.reset_parameters(normal)
        linear = [self, self.projector] if "projector" in self._modules else [self]
        for module in linear:
            for parameter in module.parameters(recurse=False):
                # Biases have the bound of their weight, as in torch.
                fan_in = parameter.shape[1] if parameter.ndim == 2 else module.weight.shape[1]
                if normal is None:
                    nn.init.uniform_(parameter, -(fan_in**-0.5), fan_in**-0.5)
                else:
                    nn.init.normal_(parameter, std=normal)
        if self.log_scale is not None:
            nn.init.constant_(self.log_scale, -math.log(_TEMPERATURE))

    def share(self, first: Router) -> None:
        assert isinstance(first, RecurrentRouter)
        if self.config.residual and first.num_experts != self.num_experts:
            raise ConfigError(
                "moe.router.residual",
                self.config.residual,
                f"adds logits of layers with {first.num_experts} and {self.num_experts} experts",
                "give all layers the same number of experts, or set it to 0",
            )
        self.borrow("cell", first)
        if self.config.shared_projector:
            self.borrow("projector", first)

    def forward(self, x_TD: Tensor, context: RoutingContext | None = None) -> Routing:
        config, precision = self.config, self.precision(x_TD)
        before_TW, logits_before_TN = self._before(context)
        # Autocast would run these products in bfloat16, and the state passes through all layers.
        with torch.autocast(x_TD.device.type, enabled=False):
            input_TP = self.projector(x_TD.to(precision))
            state_TW = self.cell(input_TP, self.cell.start_state(input_TP) if before_TW is None else before_TW)
            own_TN = self._head(state_TW[:, : config.state_size])
        logits_TN = own_TN if logits_before_TN is None else own_TN + config.residual * logits_before_TN
        carried = [state_TW] if config.passes_state else []
        if config.residual:
            carried.append(logits_TN if config.accumulate_residual else own_TN)
        # Compared as logits: sigmoids of sharp ones are equal in float32.
        state = torch.cat(carried, dim=-1) if carried else None
        return self.take_best(logits_TN, compared_TN=logits_TN, state=state)

    def _head(self, output_TP: Tensor) -> Tensor:
        """Logits from the cell's output."""
        precision = output_TP.dtype
        if self.projection_weight is None or self.log_scale is None:
            return F.linear(
                output_TP, self.weight.to(precision), None if self.bias is None else self.bias.to(precision)
            )
        low_TE = F.linear(output_TP, self.projection_weight.to(precision))
        return cosine(low_TE, self.weight.to(precision)) * sharpness(self.log_scale.to(precision), _MAX_SCALE)

    def _before(self, context: RoutingContext | None) -> tuple[Tensor | None, Tensor | None]:
        """State and logits of the layer below, each None where there are none or they play no part."""
        config = self.config
        if context is None or not config.carries_state:
            return None, None
        carried = context.previous_state(self.layer)
        if carried is None:
            return None, None
        width = self.cell.width if config.passes_state else 0
        state_TW, logits_TN = carried[:, :width], carried[:, width:]
        if config.mode == "detached":
            state_TW = state_TW.detach()
        if config.detach_residual:
            logits_TN = logits_TN.detach()
        return (state_TW if config.passes_state else None), (logits_TN if config.residual else None)
