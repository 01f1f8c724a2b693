"""Presets as models without storage, each built once."""

from __future__ import annotations

import functools

import torch

from moesaic.catalog import preset
from moesaic.hf import MoesaicForCausalLM, build


@functools.cache
def on_meta(name: str) -> MoesaicForCausalLM:
    found = preset(name)
    with torch.device("meta"):
        return build(found.backbone, found.moe)
