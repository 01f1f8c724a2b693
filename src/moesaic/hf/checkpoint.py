"""Names on disk: per-expert tensors as Qwen-MoE writes them, decoder parts as their stock family writes them.

model.layers.3.mlp.experts.7.gate_proj.weight  <->  model.backbone.layers.3.mlp.experts.gate_up_proj[7, :F]
"""

from __future__ import annotations

from moesaic.hf.compat import Concatenate, MergeModulelist, WeightConverter, WeightRenaming, register_conversion
from moesaic.hf.configuration import MoesaicConfig

# Patterns are regular expressions: without the backslashes this would also match `shared_experts`.
EXPERTS = r"\.experts\."


def _gated(kind: str, suffix: str) -> list[WeightConverter | WeightRenaming]:
    return [
        WeightConverter(
            source_patterns=[rf"{EXPERTS}*.gate_proj\.{kind}", rf"{EXPERTS}*.up_proj\.{kind}"],
            target_patterns=rf"{EXPERTS}gate_up_proj{suffix}",
            operations=[MergeModulelist(dim=0), Concatenate(dim=1)],
        )
    ]


def _single(name: str, kind: str, suffix: str) -> list[WeightConverter | WeightRenaming]:
    return [
        WeightConverter(
            source_patterns=rf"{EXPERTS}*.{name}\.{kind}",
            target_patterns=rf"{EXPERTS}{name}{suffix}",
            operations=[MergeModulelist(dim=0)],
        )
    ]


def register() -> None:
    """Register the names with transformers; what they map to depends on whether experts are gated."""
    shared = _single("down_proj", "weight", "") + _single("down_proj", "bias", "_bias")
    register_conversion("GatedExpertsBackbone", [*_gated("weight", ""), *_gated("bias", "_bias"), *shared])
    plain = [*_single("up_proj", "weight", ""), *_single("up_proj", "bias", "_bias"), *shared]
    register_conversion("PlainExpertsBackbone", plain)
    # The backbone is a child here and the model itself in its stock family.
    register_conversion(MoesaicConfig.model_type, [WeightRenaming(r"^model\.(?!backbone\.)", "model.backbone.")])
