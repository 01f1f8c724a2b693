"""Looking at a model: what its router did (`record`), what it costs (`account`), and both as a page (`write_report`)."""

from __future__ import annotations

from moesaic.trace.accounting import (
    Accounting,
    Count,
    LayerPlan,
    account,
)
from moesaic.trace.batches import (
    trace_batches,
)
from moesaic.trace.checks import (
    check_model,
    check_tokenizer,
)
from moesaic.trace.counts.count import (
    count,
)
from moesaic.trace.counts.file import load_counts, save_counts
from moesaic.trace.counts.groups import (
    DropCounts,
    GroupCounts,
)
from moesaic.trace.counts.positions import (
    PositionCounts,
)
from moesaic.trace.counts.routing import (
    LayerCounts,
    RoutingCounts,
)
from moesaic.trace.facts import (
    facts_of,
)
from moesaic.trace.header import (
    LayerFacts,
    TraceHeader,
    tokenizer_fingerprint,
)
from moesaic.trace.metrics import (
    Band,
    ExpertMatch,
    FrequencyBucket,
    MetricResult,
    TokenShare,
    apply_capacity,
    bootstrap,
    coactivation,
    coactivation_counts,
    coactivation_table,
    context_change,
    count_blocks,
    cross_layer_information,
    deviation_bound,
    distribution_change,
    domain_information,
    domain_specialisation,
    drop_rate,
    drop_rate_by_position,
    drop_rates,
    expert_outputs,
    expert_similarity,
    experts_by_frequency,
    experts_per_token,
    gate_entropy,
    gini,
    group_distribution,
    group_information,
    hidden_states,
    inner_balance,
    layer_flow,
    load_balance,
    load_shares,
    match_experts,
    noise_floor,
    null_share,
    nulls_by_frequency,
    outer_balance,
    output_similarity,
    relative_load,
    renumbered,
    router_saturation,
    routing_deviation,
    saturation_over,
    summarise,
    token_clusters,
    top_tokens,
    vocabulary_specialisation,
    weight_similarity,
)
from moesaic.trace.record import (
    LayerTrace,
    RoutingTrace,
    record,
)
from moesaic.trace.replay import (
    replay,
)
from moesaic.trace.report import (
    Report,
    make_report,
    write_report,
)
from moesaic.trace.routed_experts import (
    ImportedTrace,
    encode_routed_experts,
    from_routed_experts,
    to_routed_experts,
)
from moesaic.trace.router_statistics import (
    RouterStatistics,
    StateInfluence,
    StatisticsTables,
    router_statistics,
    watch_state,
)
from moesaic.trace.rows import (
    RoutingLog,
    Rows,
    TokenColumns,
)
from moesaic.trace.storage.file import (
    TraceFile,
)
from moesaic.trace.storage.stream import (
    StreamedTrace,
)
from moesaic.trace.storage.writer import (
    TraceWriter,
)

__all__ = [
    "Accounting",
    "Band",
    "Count",
    "DropCounts",
    "ExpertMatch",
    "FrequencyBucket",
    "GroupCounts",
    "ImportedTrace",
    "LayerCounts",
    "LayerFacts",
    "LayerPlan",
    "LayerTrace",
    "MetricResult",
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
    "apply_capacity",
    "bootstrap",
    "check_model",
    "check_tokenizer",
    "coactivation",
    "coactivation_counts",
    "coactivation_table",
    "context_change",
    "count",
    "count_blocks",
    "cross_layer_information",
    "deviation_bound",
    "distribution_change",
    "domain_information",
    "domain_specialisation",
    "drop_rate",
    "drop_rate_by_position",
    "drop_rates",
    "encode_routed_experts",
    "expert_outputs",
    "expert_similarity",
    "experts_by_frequency",
    "experts_per_token",
    "facts_of",
    "from_routed_experts",
    "gate_entropy",
    "gini",
    "group_distribution",
    "group_information",
    "hidden_states",
    "inner_balance",
    "layer_flow",
    "load_balance",
    "load_counts",
    "load_shares",
    "make_report",
    "match_experts",
    "noise_floor",
    "null_share",
    "nulls_by_frequency",
    "outer_balance",
    "output_similarity",
    "record",
    "relative_load",
    "renumbered",
    "replay",
    "router_saturation",
    "router_statistics",
    "routing_deviation",
    "saturation_over",
    "save_counts",
    "summarise",
    "to_routed_experts",
    "token_clusters",
    "tokenizer_fingerprint",
    "top_tokens",
    "trace_batches",
    "vocabulary_specialisation",
    "watch_state",
    "weight_similarity",
    "write_report",
]
