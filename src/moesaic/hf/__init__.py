"""The only place that touches transformers: config and model classes, surgery, families, conversion.

Importing it registers the model type "moesaic" with the Auto classes and the experts implementation "moesaic" with
every MoE family of transformers.
"""

from __future__ import annotations

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from moesaic.hf import checkpoint, experts
from moesaic.hf.build import build, read_backbone
from moesaic.hf.configuration import MoesaicConfig
from moesaic.hf.conversion import convert, export
from moesaic.hf.model import MoesaicForCausalLM, MoesaicModel, MoesaicPreTrainedModel
from moesaic.hf.output import MoeCausalLMOutput, MoeModelOutput
from moesaic.hf.overridable import override_routing
from moesaic.hf.router_presets import ROUTER_PRESETS, UNSUPPORTED_ROUTERS, RouterPreset, router_preset

AutoConfig.register(MoesaicConfig.model_type, MoesaicConfig, exist_ok=True)
AutoModel.register(MoesaicConfig, MoesaicModel, exist_ok=True)
AutoModelForCausalLM.register(MoesaicConfig, MoesaicForCausalLM, exist_ok=True)
checkpoint.register()
experts.register()

__all__ = [
    "ROUTER_PRESETS",
    "UNSUPPORTED_ROUTERS",
    "MoeCausalLMOutput",
    "MoeModelOutput",
    "MoesaicConfig",
    "MoesaicForCausalLM",
    "MoesaicModel",
    "MoesaicPreTrainedModel",
    "RouterPreset",
    "build",
    "convert",
    "export",
    "override_routing",
    "read_backbone",
    "router_preset",
]
