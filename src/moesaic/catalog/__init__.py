"""Published models as validated data: a backbone, its MoE layers, and the figures that its authors give.

Each preset is one YAML file in `data/`, named after it.
"""

from __future__ import annotations

from moesaic.catalog.load import preset, presets
from moesaic.catalog.schema import ParameterCount, Preset, PublishedParameters

__all__ = ["ParameterCount", "Preset", "PublishedParameters", "preset", "presets"]
