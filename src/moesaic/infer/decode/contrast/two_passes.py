"""The passes one after the other, each with a cache of its own: the plan of the published code."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moesaic.infer.decode.contrast.passes import batch_of, check_fresh, places, rows_of
from moesaic.infer.decode.overrides import OverrideSpec, RoutingSwitch
from moesaic.layer.overrides import SourceRows


class TwoPasses:
    """`Passes` of which the second has only the rows with a weak pass.

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
        contrasted = [row for row, spec in enumerate(weak) if spec is not None]
        self._weak_W, self._sources = places(contrasted, model.device), SourceRows(tuple(contrasted), len(strong))
        self._strong_factory = _prepared(switch, strong)
        self._weak_factory = _prepared(switch, [spec for spec in weak if spec is not None])
        self._weak_cache: Any = None
        self._begun = False
        self.weak_WV = torch.empty(0, 0)

    def __call__(self, inputs: dict[str, Any], /) -> Any:
        if not self._begun:
            check_fresh(inputs, batch_of(inputs))
            self._weak_cache = copy.deepcopy(inputs.get("past_key_values"))
            self._begun = True
        if len(self._weak_W):
            # Before the strong pass, whose model may change in place what it is given.
            weak = rows_of(inputs, self._weak_W) | {"past_key_values": self._weak_cache}
            with self._switch.acting(self._weak_factory, self._sources):
                self.weak_WV = self._model(**weak).logits[:, -1]
        with self._switch.acting(self._strong_factory):
            return self._model(**inputs)

    def reorder(self, cache: Any, rows_B: Tensor, /) -> Any:
        cache.reorder_cache(rows_B)
        if self._weak_cache is not None and len(self._weak_W):
            # Beams of a prompt have the same settings, so that the row that a twin continues has one too.
            place_B = torch.zeros(len(rows_B), dtype=torch.long, device=self._weak_W.device)
            place_B[self._weak_W] = torch.arange(len(self._weak_W), device=self._weak_W.device)
            self._weak_cache.reorder_cache(place_B[rows_B.to(place_B.device)[self._weak_W]])
        return cache


def _prepared(switch: RoutingSwitch, routing: Sequence[OverrideSpec]) -> Any:
    """One override for all rows where they have the same, which models with a capacity can honour too."""
    if routing and all(spec == routing[0] for spec in routing):
        return switch.prepare(routing[0])
    return switch.prepare_rows(routing) if routing else None
