"""Routers, one mechanism a file. To add one: its file, its config in `RouterConfig`, a row in the test matrix and docs."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from moesaic.layer.routers.attention import AttentionConfig, AttentionRouter
from moesaic.layer.routers.base import BaseRouterConfig, Router
from moesaic.layer.routers.base_assignment import BaseAssignmentConfig, BaseAssignmentRouter
from moesaic.layer.routers.cosine import CosineConfig, CosineRouter
from moesaic.layer.routers.dense import DenseConfig, DenseRouter
from moesaic.layer.routers.dense_to_sparse import DenseToSparseConfig, DenseToSparseRouter
from moesaic.layer.routers.dselect_k import DSelectKConfig, DSelectKRouter
from moesaic.layer.routers.expert_choice import ExpertChoiceConfig, ExpertChoiceRouter
from moesaic.layer.routers.hash import HashConfig, HashRouter
from moesaic.layer.routers.merged import MergedConfig, MergedRouter
from moesaic.layer.routers.merged_top_k import MergedTopKConfig, MergedTopKRouter
from moesaic.layer.routers.mixture_of_tokens import MixtureOfTokensConfig, MixtureOfTokensRouter
from moesaic.layer.routers.mlp import MLPConfig, MLPRouter
from moesaic.layer.routers.modality import ModalityConfig, ModalityRouter
from moesaic.layer.routers.noisy_top_k import NoisyTopKConfig, NoisyTopKRouter
from moesaic.layer.routers.normalised import NormalisedConfig, NormalisedRouter
from moesaic.layer.routers.null_experts import NullExpertsConfig, NullExpertsRouter
from moesaic.layer.routers.prototyped import PrototypedConfig, PrototypedRouter
from moesaic.layer.routers.random import RandomConfig, RandomRouter
from moesaic.layer.routers.random_skip import RandomSkipConfig, RandomSkipRouter
from moesaic.layer.routers.recurrent import RecurrentConfig, RecurrentRouter
from moesaic.layer.routers.sampled_second import SampledSecondConfig, SampledSecondRouter
from moesaic.layer.routers.scheduled_top_k import ScheduledTopKConfig, ScheduledTopKRouter
from moesaic.layer.routers.segment_merged import SegmentMergedConfig, SegmentMergedRouter
from moesaic.layer.routers.sentence import SentenceConfig, SentenceRouter
from moesaic.layer.routers.sinkhorn import SinkhornConfig, SinkhornRouter
from moesaic.layer.routers.soft_slots import SoftSlotsConfig, SoftSlotsRouter
from moesaic.layer.routers.stable import StableConfig, StableRouter
from moesaic.layer.routers.task import TaskConfig, TaskRouter
from moesaic.layer.routers.threshold import ThresholdConfig, ThresholdRouter
from moesaic.layer.routers.top_k import TopKConfig, TopKRouter


def _top_k_unless_named(values: Any) -> Any:
    return {"type": "top_k", **values} if isinstance(values, dict) else values


# The registry: a union discriminated by `type`, one line a member; a section without `type` is top_k.
RouterConfig = Annotated[
    TopKConfig  # keep the next lines in alphabetical order
    | AttentionConfig
    | BaseAssignmentConfig
    | CosineConfig
    | DSelectKConfig
    | DenseConfig
    | DenseToSparseConfig
    | ExpertChoiceConfig
    | HashConfig
    | MLPConfig
    | MergedConfig
    | MergedTopKConfig
    | MixtureOfTokensConfig
    | ModalityConfig
    | NoisyTopKConfig
    | NormalisedConfig
    | NullExpertsConfig
    | PrototypedConfig
    | RandomConfig
    | RandomSkipConfig
    | RecurrentConfig
    | SampledSecondConfig
    | ScheduledTopKConfig
    | SegmentMergedConfig
    | SentenceConfig
    | SinkhornConfig
    | SoftSlotsConfig
    | StableConfig
    | TaskConfig
    | ThresholdConfig,
    Field(discriminator="type"),
    BeforeValidator(_top_k_unless_named),
]

__all__ = [
    "AttentionConfig",
    "AttentionRouter",
    "BaseAssignmentConfig",
    "BaseAssignmentRouter",
    "BaseRouterConfig",
    "CosineConfig",
    "CosineRouter",
    "DSelectKConfig",
    "DSelectKRouter",
    "DenseConfig",
    "DenseRouter",
    "DenseToSparseConfig",
    "DenseToSparseRouter",
    "ExpertChoiceConfig",
    "ExpertChoiceRouter",
    "HashConfig",
    "HashRouter",
    "MLPConfig",
    "MLPRouter",
    "MergedConfig",
    "MergedRouter",
    "MergedTopKConfig",
    "MergedTopKRouter",
    "MixtureOfTokensConfig",
    "MixtureOfTokensRouter",
    "ModalityConfig",
    "ModalityRouter",
    "NoisyTopKConfig",
    "NoisyTopKRouter",
    "NormalisedConfig",
    "NormalisedRouter",
    "NullExpertsConfig",
    "NullExpertsRouter",
    "PrototypedConfig",
    "PrototypedRouter",
    "RandomConfig",
    "RandomRouter",
    "RandomSkipConfig",
    "RandomSkipRouter",
    "RecurrentConfig",
    "RecurrentRouter",
    "Router",
    "RouterConfig",
    "SampledSecondConfig",
    "SampledSecondRouter",
    "ScheduledTopKConfig",
    "ScheduledTopKRouter",
    "SegmentMergedConfig",
    "SegmentMergedRouter",
    "SentenceConfig",
    "SentenceRouter",
    "SinkhornConfig",
    "SinkhornRouter",
    "SoftSlotsConfig",
    "SoftSlotsRouter",
    "StableConfig",
    "StableRouter",
    "TaskConfig",
    "TaskRouter",
    "ThresholdConfig",
    "ThresholdRouter",
    "TopKConfig",
    "TopKRouter",
]
