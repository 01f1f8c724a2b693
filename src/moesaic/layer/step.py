"""What changes once an optimiser step, from the load of the step: router state, selection bias, coefficients."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from moesaic.layer.block import MoEBlock
from moesaic.layer.load import LayerLoad


@torch.no_grad()
def post_step(blocks: Mapping[int, MoEBlock], loads: Mapping[int, LayerLoad], progress: float) -> None:
    """Commit the state of the MoE blocks of a model after an optimiser step.

    Args:
        blocks: by layer index.
        loads: load of each layer over the step's forward passes in training mode: all micro-batches and, by
            `all_reduce_loads`, all data-parallel ranks. Layers that did not run stay as they are.
        progress: share of the training that is done, the step included, 0 to 1.
    """
    for layer, load in loads.items():
        blocks[layer].post_step(load, progress)
