"""Looking at a model: what its router did (`record`), what it costs (`account`), and both as a page (`write_report`)."""

from __future__ import annotations

from moesaic.trace.accounting import Accounting, Count, LayerPlan, account
from moesaic.trace.batches import trace_batches
from moesaic.trace.metrics import (
    TokenShare,
    coactivation,
    coactivation_counts,
    drop_rate,
    drop_rate_by_position,
    load_shares,
    null_share,
    relative_load,
    top_tokens,
)
from moesaic.trace.positions import PositionCounts
from moesaic.trace.record import LayerTrace, RoutingTrace, record
from moesaic.trace.report import write_report
from moesaic.trace.specialisation import (
    cross_layer_information,
    domain_information,
    expert_similarity,
    gate_entropy,
    inner_balance,
    outer_balance,
)

__all__ = [
    "Accounting",
    "Count",
    "LayerPlan",
    "LayerTrace",
    "PositionCounts",
    "RoutingTrace",
    "TokenShare",
    "account",
    "coactivation",
    "coactivation_counts",
    "cross_layer_information",
    "domain_information",
    "drop_rate",
    "drop_rate_by_position",
    "expert_similarity",
    "gate_entropy",
    "inner_balance",
    "load_shares",
    "null_share",
    "outer_balance",
    "record",
    "relative_load",
    "top_tokens",
    "trace_batches",
    "write_report",
]
