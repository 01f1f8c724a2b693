"""Between stock transformers MoE models and ours: `convert`, `export`, and specs of stock configs.

Each family reads its config as a `MoESpec` and renames or reorders its block's tensors; everything outside the blocks
is the same module on both sides.
"""

from __future__ import annotations

from moesaic.hf.conversion.convert import convert
from moesaic.hf.conversion.export import export
from moesaic.hf.conversion.registry import CONVERSIONS, conversion_of, spec_from_config

__all__ = ["CONVERSIONS", "conversion_of", "convert", "export", "spec_from_config"]
