"""The option --override of commands that run a model."""

from __future__ import annotations

import contextlib
from typing import Annotated

import typer
from transformers import PreTrainedModel

from moesaic.infer.decode import override_routing

Override = Annotated[
    list[str] | None,
    typer.Option(
        help="Route otherwise than the model would: k=4, rank=2, random=1, experts=0,3, without=5, dynamic=0.5, null=0.1, "
        "scale=2, total=1, temperature=0.5 or replay=FOLDER, joined by +, each with @0-3,7 for some layers only; or a YAML "
        "file. May be repeated (docs: Routing overrides)."
    ),
]


def routing_of(model: PreTrainedModel, override: list[str] | None) -> contextlib.AbstractContextManager[None]:
    """The model's own routing, or that of the option.

    Raises:
        ConfigError: see `moesaic.override_routing`, as for the further errors.
    """
    return override_routing(model, override) if override else contextlib.nullcontext()
