"""`override_routing(model, override)`: run a model with another routing than its own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

from torch import nn

from moesaic.errors import ConfigError, UnsupportedOverride
from moesaic.hf.overridable import Overridable, overridable
from moesaic.infer.decode.overrides.replayed import ReplayedTrace, check_replays
from moesaic.infer.decode.overrides.spec import ByRow, OverrideLike, OverrideSpec
from moesaic.layer import OverrideFactory, RoutingContext, RoutingOverride, override_of
from moesaic.layer.overrides import OverridePart, Parts, RowOverrides, check_parts
from moesaic.layer.routers import Router


@contextlib.contextmanager
def override_routing(
    model: nn.Module, override: OverrideLike = (), *, rows: Sequence[OverrideLike | None] | None = None
) -> Iterator[None]:
    """Run every forward pass that begins inside the block with another routing, of our models and of stock ones.

        with moesaic.override_routing(model, "rank=2"):
            model.generate(**inputs)
        with moesaic.override_routing(model, rows=[None, "rank=2", "k=4+temperature=0.5"]):
            model(ids)  # three rows

    docs/routing-overrides.md says what there is. Blocks may be nested: an inner override gets what the outer one made. The
    model is as it was after the block, also after an error, and when a generator that holds the block is closed or
    forgotten. A thread with an override of its own follows only its own, so that threads do not interfere; one without
    follows the override of the thread that has one.

    Args:
        model: a moesaic model, a stock MoE model of transformers whose routers return picks and weights, or a module that
            holds one.
        override: for all rows: a text, a part, several, a mapping, an `OverrideSpec`, or the path of a YAML file.
        rows: instead, one for each row of the batch, or None for the model's own routing. With fewer entries than rows,
            entry i stands for as many rows in a row as there are for each (beams and sequences of a prompt in `generate`).

    Raises:
        ConfigError: before anything runs, if an override is malformed, a field does not fit the model, a layer has no router,
            or two parts choose in one layer; in a forward pass, if `rows` does not fit its batch.
        UnsupportedModel: if the model has no MoE layer, or its routing can't be read.
        UnsupportedOverride: before anything runs, if a router can't honour a part; in a forward pass, if a token has fewer
            experts to pick than a part needs.
        TraceError: as for `moesaic.replay`.
    """
    found = overridable(model)
    if rows is None:
        factory = factory_of(OverrideSpec.of(override), model, found)
    else:
        if not isinstance(override, tuple) or override:
            raise ConfigError("rows", list(rows), "goes with no override for all rows", "give one of the two")
        factory = factory_by_row(ByRow.of(rows), model, found)
    with found.override_routing(factory):
        yield


def check_override(override: OverrideLike, routers: Mapping[int, Router]) -> OverrideSpec:
    """The override, checked against the routers that it is for.

    Args:
        override: anything that says one.
        routers: by decoder layer index.

    Raises:
        ConfigError: see `override_routing`.
        UnsupportedOverride: see `override_routing`.
    """
    spec = OverrideSpec.of(override)
    check_replays(spec.parts, routers)
    check_parts(spec.parts, routers)
    return spec


def factory_of(spec: OverrideSpec, model: nn.Module, found: Overridable) -> OverrideFactory:
    """What makes the override of each forward pass, checked against the model; raises what `override_routing` does."""
    check_override(spec, found.routers)
    factories: list[OverrideFactory] = [
        part.factory(model, found) for part in spec.parts if isinstance(part, ReplayedTrace)
    ]
    parts: list[OverridePart] = [part for part in spec.parts if not isinstance(part, ReplayedTrace)]
    if parts or not factories:
        factories.append(Parts(parts))
    return factories[0] if len(factories) == 1 else _Several(factories)


def factory_by_row(by_row: ByRow, model: nn.Module, found: Overridable, *, literal: bool = False) -> OverrideFactory:
    """As `factory_of`, with an override of its own for each row; see `RowOverrides` for `literal`."""
    if found.limited:
        raise UnsupportedOverride(
            f"layer {min(found.limited)} has a capacity, for which rows of one batch compete and whose slots follow from the "
            "widest row; give all rows the same override, or remove the capacity"
        )
    factories: dict[int, OverrideFactory] = {}
    for spec in by_row.rows:
        if spec is not None and id(spec) not in factories:
            factories[id(spec)] = factory_of(spec, model, found)
    return RowOverrides([None if spec is None else factories[id(spec)] for spec in by_row.rows], literal=literal)


class _Several:
    """Overrides of one pass, each of which gets what the one before made."""

    def __init__(self, factories: Sequence[OverrideFactory]) -> None:
        self._factories = factories

    def __call__(self, context: RoutingContext, num_tokens: int) -> RoutingOverride | None:
        return override_of(self._factories, context, num_tokens)
