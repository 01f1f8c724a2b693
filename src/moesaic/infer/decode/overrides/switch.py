"""Overrides that are checked once and act in one forward pass and not in the next."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from torch import nn

from moesaic.hf.overridable import overridable
from moesaic.infer.decode.overrides.apply import factory_by_row, factory_of
from moesaic.infer.decode.overrides.spec import ByRow, OverrideSpec
from moesaic.layer import OverrideFactory, RoutingContext, RoutingOverride
from moesaic.layer.overrides import SourceRows, from_rows


class RoutingSwitch:
    """The overrides that a decoder changes between; until it is entered, and between passes, none acts.

    It holds for forward passes of the thread that enters it alone: others decode as if it were not there. An override around
    it acts first, as with nested blocks.

    Args:
        model: as for `moesaic.override_routing`.

    Raises:
        UnsupportedModel: if it has no MoE layer, or its routing can't be read.
        UnsupportedOverride: if picks of its tokens can't be replaced.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model, self._found = model, overridable(model)
        self._acting: OverrideFactory | None = None

    @property
    def limited(self) -> frozenset[int]:
        """Layers with a capacity of their own, for which rows of one batch compete."""
        return self._found.limited

    def prepare(self, spec: OverrideSpec) -> OverrideFactory | None:
        """An override of all rows, checked; None if it changes nothing.

        Raises:
            MoesaicError: see `moesaic.override_routing`.
        """
        factory = factory_of(spec, self._model, self._found)
        return factory if spec.parts else None

    def prepare_rows(self, rows: Sequence[OverrideSpec | None]) -> OverrideFactory:
        """An override for each row, checked.

        Raises:
            MoesaicError: see `moesaic.override_routing`.
        """
        by_row = ByRow.of([None if spec is None or not spec.parts else spec for spec in rows])
        return factory_by_row(by_row, self._model, self._found, literal=True)

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Inside this block passes can be switched."""
        with self._found.override_routing(self, own_thread=True):
            yield

    @contextlib.contextmanager
    def acting(self, factory: OverrideFactory | None, sources: SourceRows | None = None) -> Iterator[None]:
        """Run forward passes with an override that was prepared.

        Args:
            factory: the override.
            sources: what the rows of these passes stand for, so that overrides by row around know theirs.
        """
        before, self._acting = self._acting, factory
        try:
            with from_rows(sources):
                yield
        finally:
            self._acting = before

    def __call__(self, context: RoutingContext, num_tokens: int) -> RoutingOverride | None:
        return None if self._acting is None else self._acting(context, num_tokens)
