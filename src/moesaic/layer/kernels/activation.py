"""What happens between the two projections, in words that a fused kernel can act on."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FusedName = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2", "clamped_swiglu"]


@dataclass(frozen=True)
class FusedActivation:
    """The map from the first projection's rows (S, H) to (S, F), described instead of called.

    Attributes:
        name: elementwise function; "clamped_swiglu" is gpt-oss's gate, (u + 1) * g * sigmoid(alpha * g) with g clamped
            above and u on both sides at `limit`.
        gated: H = 2F and the result is name(gate) * up; otherwise H = F and it is name(row).
        interleaved: gate and up alternate along H; otherwise all of gate comes first.
        alpha: sigmoid gain of "clamped_swiglu", None for others.
        limit: clamp of "clamped_swiglu", None for others.
    """

    name: FusedName
    gated: bool
    interleaved: bool = False
    alpha: float | None = None
    limit: float | None = None

    def __call__(self, rows_SH: Tensor) -> Tensor:
        """The reference in torch operations; a kernel that fuses must equal it."""
        if not self.gated:
            return _elementwise(self.name, rows_SH)
        gate, up = (rows_SH[..., ::2], rows_SH[..., 1::2]) if self.interleaved else rows_SH.chunk(2, dim=-1)
        if self.alpha is None or self.limit is None:
            return _elementwise(self.name, gate) * up
        gate, up = gate.clamp(max=self.limit), up.clamp(min=-self.limit, max=self.limit)
        return (up + 1) * gate * torch.sigmoid(self.alpha * gate)


def _elementwise(name: FusedName, x: Tensor) -> Tensor:
    match name:
        case "silu":
            return F.silu(x)
        case "gelu":
            return F.gelu(x)
        case "gelu_tanh":
            return F.gelu(x, approximate="tanh")
        case "relu":
            return F.relu(x)
        case "relu2":
            return F.relu(x).square()
        case "clamped_swiglu":
            raise ValueError("clamped_swiglu is gated and needs alpha and limit")


# Functions and classes of torch and of transformers' ACT2FN, by name: this room imports no transformers. Only classes
# whose forward has no options are here. tests/hf/test_fused_activation.py compares the numbers.
_BY_NAME: dict[str, FusedName] = {
    "silu": "silu",
    "gelu": "gelu",
    "relu": "relu",
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "ReLU": "relu",
    "ReLUSquaredActivation": "relu2",
}
# Experts with gpt-oss's gate: interleaved or not, and the attributes that hold alpha and limit.
_CLAMPED: dict[str, tuple[bool, str, str]] = {
    "GptOssExperts._apply_gate": (True, "alpha", "limit"),
    "OpenAIPrivacyFilterExperts._apply_gate": (False, "alpha", "limit"),
    "MiniMaxM3VLExperts._apply_gate": (False, "swiglu_alpha", "swiglu_limit"),
}
_DEFAULT_GATE = "_default_apply_gate"
_KNOWN_PACKAGES = ("torch", "transformers")


def recognise(module: Any) -> FusedActivation | None:
    """The activation of an experts module that follows transformers' conventions; None if it is something else.

    A module can say it itself with an attribute `fused_activation`, as ours do.
    """
    # Not getattr: a module that lacks the attribute would look through its parameters and raise, at each token.
    own = vars(module)
    if "fused_activation" in own:
        return own["fused_activation"]
    if module.has_gate:
        gate_name = _gate_name(type(module))
        if gate_name in _CLAMPED:
            interleaved, alpha, limit = _CLAMPED[gate_name]
            return FusedActivation(
                "clamped_swiglu", True, interleaved, float(getattr(module, alpha)), float(getattr(module, limit))
            )
        # An own gate may do anything. The default one splits in halves.
        if gate_name != _DEFAULT_GATE or "_apply_gate" in own:
            return None
    act_fn = module.act_fn
    name = _BY_NAME.get(_activation_name(type(act_fn) if isinstance(act_fn, nn.Module) else act_fn))
    return None if name is None else FusedActivation(name, bool(module.has_gate))


# The decorator is for plain functions: torch.compile would trace into a cached one, and can't.
@torch.compiler.assume_constant_result
def _gate_name(experts_class: type) -> str:
    return _known_name(getattr(experts_class, "_apply_gate", None))


@torch.compiler.assume_constant_result
def _activation_name(activation: Any) -> str:
    return _known_name(activation)


@functools.lru_cache(maxsize=256)
def _known_name(thing: Any) -> str:
    """Its qualified name if torch or transformers define it: others may give another thing the same name."""
    package = (getattr(thing, "__module__", None) or "").partition(".")[0]
    return getattr(thing, "__qualname__", "") if package in _KNOWN_PACKAGES else ""
