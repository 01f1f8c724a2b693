"""What an MoE layer is: record, routers, experts, kernels, balance. Pure torch.

Tensor names end in their shape: T tokens (batch times sequence), B sequences, D hidden size, N experts, K picks of a
token, M columns that a router scores (experts and null experts), S = T*K rows sent to experts, F hidden size of an expert, H = 2F for gated experts and F for others, G groups of
experts and E experts in a group, I and O input and output width of a projection.

    x_TD -> router -> Routing -> order -> rows_SD -> experts -> restore -> y_TD (+ shared_experts(x_TD))
"""

from __future__ import annotations

from moesaic.layer.balance import (
    AdaptiveCoefficient,
    BalanceLoss,
    LoadBalancing,
    SelectionBiasUpdate,
    ZLoss,
    expert_load,
    max_violation,
    routing_entropy,
)
from moesaic.layer.block import MoEBlock
from moesaic.layer.capacity import CapacityConfig, limit_capacity
from moesaic.layer.experts import Experts, ExpertsConfig
from moesaic.layer.load import LayerLoad, all_reduce_loads, loads_of
from moesaic.layer.permutation import Order, gather, order, restore
from moesaic.layer.record import Routing, RoutingContext
from moesaic.layer.routers import (
    AttentionConfig,
    AttentionRouter,
    BaseRouterConfig,
    CosineConfig,
    CosineRouter,
    DenseConfig,
    DenseRouter,
    ExpertChoiceConfig,
    ExpertChoiceRouter,
    HashConfig,
    HashRouter,
    MLPConfig,
    MLPRouter,
    ModalityConfig,
    ModalityRouter,
    NoisyTopKConfig,
    NoisyTopKRouter,
    NormalisedConfig,
    NormalisedRouter,
    NullExpertsConfig,
    NullExpertsRouter,
    PrototypedConfig,
    PrototypedRouter,
    RandomConfig,
    RandomRouter,
    Router,
    RouterConfig,
    SampledSecondConfig,
    SampledSecondRouter,
    SentenceConfig,
    SentenceRouter,
    SoftSlotsConfig,
    SoftSlotsRouter,
    TaskConfig,
    TaskRouter,
    ThresholdConfig,
    ThresholdRouter,
    TopKConfig,
    TopKRouter,
)
from moesaic.layer.schedule import Schedule
from moesaic.layer.shared_experts import SharedExperts, SharedExpertsConfig
from moesaic.layer.spec import LayerPlacement, MoESpec
from moesaic.layer.step import post_step

__all__ = [
    "AdaptiveCoefficient",
    "AttentionConfig",
    "AttentionRouter",
    "BalanceLoss",
    "BaseRouterConfig",
    "CapacityConfig",
    "CosineConfig",
    "CosineRouter",
    "DenseConfig",
    "DenseRouter",
    "ExpertChoiceConfig",
    "ExpertChoiceRouter",
    "Experts",
    "ExpertsConfig",
    "HashConfig",
    "HashRouter",
    "LayerLoad",
    "LayerPlacement",
    "LoadBalancing",
    "MLPConfig",
    "MLPRouter",
    "MoEBlock",
    "MoESpec",
    "ModalityConfig",
    "ModalityRouter",
    "NoisyTopKConfig",
    "NoisyTopKRouter",
    "NormalisedConfig",
    "NormalisedRouter",
    "NullExpertsConfig",
    "NullExpertsRouter",
    "Order",
    "PrototypedConfig",
    "PrototypedRouter",
    "RandomConfig",
    "RandomRouter",
    "Router",
    "RouterConfig",
    "Routing",
    "RoutingContext",
    "SampledSecondConfig",
    "SampledSecondRouter",
    "Schedule",
    "SelectionBiasUpdate",
    "SentenceConfig",
    "SentenceRouter",
    "SharedExperts",
    "SharedExpertsConfig",
    "SoftSlotsConfig",
    "SoftSlotsRouter",
    "TaskConfig",
    "TaskRouter",
    "ThresholdConfig",
    "ThresholdRouter",
    "TopKConfig",
    "TopKRouter",
    "ZLoss",
    "all_reduce_loads",
    "expert_load",
    "gather",
    "limit_capacity",
    "loads_of",
    "max_violation",
    "order",
    "post_step",
    "restore",
    "routing_entropy",
]
