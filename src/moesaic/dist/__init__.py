"""Training over processes on torch's own engine: meshes, expert parallelism, FSDP2."""

from __future__ import annotations

from moesaic.dist.config import ParallelConfig
from moesaic.dist.expert_parallel import ExpertParallel
from moesaic.dist.gradients import clip_grad_norm, sync_replicated
from moesaic.dist.initialise import build_sharded
from moesaic.dist.layout import Layout, layouts
from moesaic.dist.mesh import Meshes
from moesaic.dist.parallelize import Sharded, parallelize

__all__ = [
    "ExpertParallel",
    "Layout",
    "Meshes",
    "ParallelConfig",
    "Sharded",
    "build_sharded",
    "clip_grad_norm",
    "layouts",
    "parallelize",
    "sync_replicated",
]
