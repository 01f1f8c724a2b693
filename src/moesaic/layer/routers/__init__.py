"""Routers, one mechanism a file. To add one: its file, its config in `RouterConfig`, a row in the test matrix and docs."""

from __future__ import annotations

from moesaic.layer.routers.base import BaseRouterConfig, Router
from moesaic.layer.routers.top_k import TopKConfig, TopKRouter

# The registry: with a second router it becomes `Annotated[A | B, Field(discriminator="type")]`, one line a member.
RouterConfig = TopKConfig

__all__ = ["BaseRouterConfig", "Router", "RouterConfig", "TopKConfig", "TopKRouter"]
