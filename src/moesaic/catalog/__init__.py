"""Published models and mechanisms as validated data.

A **preset** is a model that can be built: one YAML file in `data/`, named after it, with a backbone, its MoE layers, and
the figures that its authors give. A **record** is what is known of a model, whether it can be built or not: the entries of
the files in `models/`. The **taxonomy** says of each mechanism of the field what moesaic has of it, and where.
"""

from __future__ import annotations

from moesaic.catalog.counting import CannotCount, DtypeName, Size, size_of
from moesaic.catalog.load import model, models, preset, presets
from moesaic.catalog.schema import ModelRecord, ParameterCount, Preset, PublishedParameters
from moesaic.catalog.shape import Shape
from moesaic.catalog.shrink import shrink
from moesaic.catalog.taxonomy import (
    DECISIONS,
    Mechanism,
    RoutingLoss,
    branches,
    equations,
    losses,
    mechanism,
    mechanisms,
)

__all__ = [
    "DECISIONS",
    "CannotCount",
    "DtypeName",
    "Mechanism",
    "ModelRecord",
    "ParameterCount",
    "Preset",
    "PublishedParameters",
    "RoutingLoss",
    "Shape",
    "Size",
    "branches",
    "equations",
    "losses",
    "mechanism",
    "mechanisms",
    "model",
    "models",
    "preset",
    "presets",
    "shrink",
    "size_of",
]
