"""Looking at a model: what its router did (`record`), what it costs (`account`), and both as a page (`write_report`)."""

from __future__ import annotations

from moesaic.trace.accounting import Accounting, Count, LayerPlan, account
from moesaic.trace.batches import trace_batches
from moesaic.trace.checks import check_model, check_tokenizer
from moesaic.trace.counting import count
from moesaic.trace.counts import LayerCounts, RoutingCounts
from moesaic.trace.file import TraceFile
from moesaic.trace.group_counts import DropCounts, GroupCounts
from moesaic.trace.header import LayerFacts, TraceHeader, tokenizer_fingerprint
from moesaic.trace.metrics import (
    FrequencyBucket,
    TokenShare,
    coactivation,
    coactivation_counts,
    drop_rate,
    drop_rate_by_position,
    experts_by_frequency,
    experts_per_token,
    load_shares,
    null_share,
    relative_load,
    top_tokens,
)
from moesaic.trace.positions import PositionCounts
from moesaic.trace.record import LayerTrace, RoutingTrace, record
from moesaic.trace.replay import replay
from moesaic.trace.report import Report, make_report, write_report
from moesaic.trace.router_statistics import (
    RouterStatistics,
    StateInfluence,
    StatisticsTables,
    router_statistics,
    watch_state,
)
from moesaic.trace.rows import RoutingLog, Rows, TokenColumns
from moesaic.trace.specialisation import (
    cross_layer_information,
    domain_information,
    expert_similarity,
    gate_entropy,
    inner_balance,
    outer_balance,
)
from moesaic.trace.stream import StreamedTrace
from moesaic.trace.writer import TraceWriter

__all__ = [
    "Accounting",
    "Count",
    "DropCounts",
    "FrequencyBucket",
    "GroupCounts",
    "LayerCounts",
    "LayerFacts",
    "LayerPlan",
    "LayerTrace",
    "PositionCounts",
    "Report",
    "RouterStatistics",
    "RoutingCounts",
    "RoutingLog",
    "RoutingTrace",
    "Rows",
    "StateInfluence",
    "StatisticsTables",
    "StreamedTrace",
    "TokenColumns",
    "TokenShare",
    "TraceFile",
    "TraceHeader",
    "TraceWriter",
    "account",
    "check_model",
    "check_tokenizer",
    "coactivation",
    "coactivation_counts",
    "count",
    "cross_layer_information",
    "domain_information",
    "drop_rate",
    "drop_rate_by_position",
    "expert_similarity",
    "experts_by_frequency",
    "experts_per_token",
    "gate_entropy",
    "inner_balance",
    "load_shares",
    "make_report",
    "null_share",
    "outer_balance",
    "record",
    "relative_load",
    "replay",
    "router_statistics",
    "tokenizer_fingerprint",
    "top_tokens",
    "trace_batches",
    "watch_state",
    "write_report",
]
