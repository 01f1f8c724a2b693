"""Names on disk: per-expert tensors as Qwen-MoE writes them, decoder parts as their stock family writes them.

model.layers.3.mlp.experts.7.gate_proj.weight  <->  model.backbone.layers.3.mlp.experts.gate_up_proj[7, :F]
"""

from __future__ import annotations

from moesaic.hf.compat import Concatenate, MergeModulelist, WeightConverter, WeightRenaming, register_conversion
from moesaic.hf.configuration import MoesaicConfig

# Patterns are regular expressions: without the backslashes this would also match `shared_experts`.
EXPERTS = r"\.experts\."


# Projections that are packed into one, in their order, by the class of the backbone whose experts have them.
BACKBONES = {
    "PlainExpertsBackbone": ("up_proj",),
    "GatedExpertsBackbone": ("gate_proj", "up_proj"),
    "DoublyGatedExpertsBackbone": ("gate_linear_proj", "gate_proj", "up_proj"),
}


def _packed(names: tuple[str, ...], kind: str, suffix: str) -> list[WeightConverter | WeightRenaming]:
    return [
        WeightConverter(
            source_patterns=[rf"{EXPERTS}*.{name}\.{kind}" for name in names],
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
    """Register the names with transformers; what they map to depends on how experts are gated."""
    down = _single("down_proj", "weight", "") + _single("down_proj", "bias", "_bias")
    for backbone, names in BACKBONES.items():
        if len(names) == 1:
            up = [*_single(names[0], "weight", ""), *_single(names[0], "bias", "_bias")]
        else:
            up = [*_packed(names, "weight", ""), *_packed(names, "bias", "_bias")]
        register_conversion(backbone, [*up, *down])
    # The backbone is a child here and the model itself in its stock family.
    register_conversion(MoesaicConfig.model_type, [WeightRenaming(r"^model\.(?!backbone\.)", "model.backbone.")])
