"""Parts of routing overrides, one mechanism a file, and how they act together and by row.

A part is a config; `Parts` makes an override of several, `RowOverrides` of one for each row of a batch. They go where every
`OverrideFactory` goes: `MoesaicModel.override_routing`, `moesaic.hf.override_routing`.
"""

from __future__ import annotations

from moesaic.layer.overrides.base import OverridePart, Phase, Picking, TokenKeys
from moesaic.layer.overrides.chain import Parts, check_parts
from moesaic.layer.overrides.dynamic import DynamicExperts
from moesaic.layer.overrides.experts import FixedExperts
from moesaic.layer.overrides.null_below import NullBelow
from moesaic.layer.overrides.random import RandomExperts
from moesaic.layer.overrides.rank import Rank
from moesaic.layer.overrides.rows import RowOverrides, SourceRows, from_rows
from moesaic.layer.overrides.top_k import TopK
from moesaic.layer.overrides.weights import ScaledWeights, TemperedWeights, TotalWeights
from moesaic.layer.overrides.without import WithoutExperts

__all__ = [
    "DynamicExperts",
    "FixedExperts",
    "NullBelow",
    "OverridePart",
    "Parts",
    "Phase",
    "Picking",
    "RandomExperts",
    "Rank",
    "RowOverrides",
    "ScaledWeights",
    "SourceRows",
    "TemperedWeights",
    "TokenKeys",
    "TopK",
    "TotalWeights",
    "WithoutExperts",
    "check_parts",
    "from_rows",
]
