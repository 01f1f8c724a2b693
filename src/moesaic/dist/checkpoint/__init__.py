"""Checkpoints of any number of processes, in any layout, that any other number in any other layout can read."""

from __future__ import annotations

from moesaic.dist.checkpoint.optimizer import load_optimizer
from moesaic.dist.checkpoint.read import load_weights
from moesaic.dist.checkpoint.snapshot import Snapshot
from moesaic.dist.checkpoint.team import Team, WriteFailed

__all__ = ["Snapshot", "Team", "WriteFailed", "load_optimizer", "load_weights"]
