"""Pictures of a sweep: accuracy against cost, and grids of two parameters as heat maps."""

from __future__ import annotations

from moesaic.infer.tasks.pictures.grids import Grid, Line, grids_of
from moesaic.infer.tasks.pictures.write import check_picture, draw_sweep

__all__ = ["Grid", "Line", "check_picture", "draw_sweep", "grids_of"]
