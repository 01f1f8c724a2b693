"""Routing metrics: pure functions of counts (`count`), of two aligned logs, or of experts; docs/metrics.md has the formulas."""

from __future__ import annotations

from moesaic.trace.metrics.bootstrap import bootstrap, count_blocks
from moesaic.trace.metrics.capacity import apply_capacity
from moesaic.trace.metrics.change import distribution_change
from moesaic.trace.metrics.coactivation import coactivation, coactivation_counts, coactivation_table, layer_flow
from moesaic.trace.metrics.context import context_change
from moesaic.trace.metrics.deviation import deviation_bound, group_distribution, noise_floor, routing_deviation
from moesaic.trace.metrics.domains import domain_specialisation
from moesaic.trace.metrics.drops import drop_rate, drop_rate_by_position, drop_rates
from moesaic.trace.metrics.frequency import FrequencyBucket, experts_by_frequency, nulls_by_frequency
from moesaic.trace.metrics.gates import (
    cross_layer_information,
    domain_information,
    gate_entropy,
    inner_balance,
    outer_balance,
)
from moesaic.trace.metrics.information import group_information
from moesaic.trace.metrics.load import (
    experts_per_token,
    gini,
    load_balance,
    load_shares,
    null_share,
    relative_load,
)
from moesaic.trace.metrics.matching import ExpertMatch, match_experts, renumbered
from moesaic.trace.metrics.result import Band, MetricResult
from moesaic.trace.metrics.saturation import router_saturation, saturation_over
from moesaic.trace.metrics.similarity import (
    expert_outputs,
    expert_similarity,
    hidden_states,
    output_similarity,
    weight_similarity,
)
from moesaic.trace.metrics.summary import summarise
from moesaic.trace.metrics.tokens import TokenShare, token_clusters, top_tokens
from moesaic.trace.metrics.vocabulary import vocabulary_specialisation

__all__ = [
    "Band",
    "ExpertMatch",
    "FrequencyBucket",
    "MetricResult",
    "TokenShare",
    "apply_capacity",
    "bootstrap",
    "coactivation",
    "coactivation_counts",
    "coactivation_table",
    "context_change",
    "count_blocks",
    "cross_layer_information",
    "deviation_bound",
    "distribution_change",
    "domain_information",
    "domain_specialisation",
    "drop_rate",
    "drop_rate_by_position",
    "drop_rates",
    "expert_outputs",
    "expert_similarity",
    "experts_by_frequency",
    "experts_per_token",
    "gate_entropy",
    "gini",
    "group_distribution",
    "group_information",
    "hidden_states",
    "inner_balance",
    "layer_flow",
    "load_balance",
    "load_shares",
    "match_experts",
    "noise_floor",
    "null_share",
    "nulls_by_frequency",
    "outer_balance",
    "output_similarity",
    "relative_load",
    "renumbered",
    "router_saturation",
    "routing_deviation",
    "saturation_over",
    "summarise",
    "token_clusters",
    "top_tokens",
    "vocabulary_specialisation",
    "weight_similarity",
]
