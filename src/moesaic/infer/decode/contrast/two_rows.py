"""Both passes as rows of one batch: one forward pass a step, one cache, and weights that both need are read once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moesaic.infer.decode.contrast.passes import check_fresh, output_rows, places, rows_of
from moesaic.infer.decode.overrides import OverrideSpec, RoutingSwitch
from moesaic.layer.overrides import SourceRows


class TwoRows:
    """`Passes` in which each row with a weak pass is followed by its weak twin.

    Args:
        model: the model.
        switch: of its routing.
        strong: routing of each row; no parts is the model's own.
        weak: routing of each row's weak pass, or None where it has none.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        switch: RoutingSwitch,
        strong: Sequence[OverrideSpec],
        weak: Sequence[OverrideSpec | None],
    ) -> None:
        self._model, self._switch = model, switch
        routing: list[OverrideSpec] = []
        source, strong_places, weak_places = [], [], []
        for row, (own, other) in enumerate(zip(strong, weak, strict=True)):
            strong_places.append(len(source))
            source.append(row)
            routing.append(own)
            if other is not None:
                weak_places.append(len(source))
                source.append(row)
                routing.append(other)
        device = model.device
        self._source_R, self._strong_B = places(source, device), places(strong_places, device)
        self._weak_W = places(weak_places, device)
        self._sources = SourceRows(tuple(source), len(strong))
        self._factory = switch.prepare_rows(routing)
        self._begun = False
        self.weak_WV = torch.empty(0, 0)

    def __call__(self, inputs: dict[str, Any], /) -> Any:
        if not self._begun:
            check_fresh(inputs, len(self._source_R))
            self._begun = True
        with self._switch.acting(self._factory, self._sources):
            output = self._model(**rows_of(inputs, self._source_R))
        self.weak_WV = output.logits[:, -1].index_select(0, self._weak_W.to(output.logits.device))
        return output_rows(output, self._strong_B, len(self._source_R))

    def reorder(self, cache: Any, rows_B: Tensor, /) -> Any:
        """Rows move with their twins; beams of a prompt have the same settings, so that both have one or none."""
        rows_B = rows_B.to(self._source_R.device)
        begin_R = self._strong_B[rows_B][self._source_R]
        is_weak_R = torch.zeros_like(self._source_R)
        is_weak_R[self._weak_W] = 1
        cache.reorder_cache(begin_R + is_weak_R)
        return cache

    def leave_strong(self, cache: Any) -> None:
        """Drop the rows of weak passes from a cache that outlives the generation."""
        cache.reorder_cache(self._strong_B)
