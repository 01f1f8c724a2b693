"""moesaic: Mixture-of-Experts for PyTorch and HF Transformers under one layer contract.

Importing it registers the model type "moesaic" with the Auto classes, and the expert kernels under
`experts_implementation="moesaic"` for every MoE family of transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moesaic.catalog import preset
from moesaic.hf import MoeCausalLMOutput, MoesaicConfig, MoesaicForCausalLM, MoesaicModel, build, convert, export
from moesaic.infer.decode import DecodingSpec, OverrideSpec, SelfContrast, fast_decoding, override_routing
from moesaic.layer import MoESpec
from moesaic.trace import record, replay
from moesaic.transform import add_null_experts, upcycle

if TYPE_CHECKING:
    from moesaic.train import Balancer, balance

__version__ = "0.1.0"

__all__ = [
    "Balancer",
    "DecodingSpec",
    "MoESpec",
    "MoeCausalLMOutput",
    "MoesaicConfig",
    "MoesaicForCausalLM",
    "MoesaicModel",
    "OverrideSpec",
    "SelfContrast",
    "add_null_experts",
    "balance",
    "build",
    "convert",
    "export",
    "fast_decoding",
    "override_routing",
    "preset",
    "record",
    "replay",
    "upcycle",
]


def __getattr__(name: str) -> Any:
    """`balance` and `Balancer`, on first use: training imports much that models don't need."""
    if name in ("Balancer", "balance"):
        from moesaic import train

        return getattr(train, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
