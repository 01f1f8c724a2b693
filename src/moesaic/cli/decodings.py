"""The option --decode of commands that generate."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from moesaic.cli.models import model_folder
from moesaic.errors import ConfigError
from moesaic.infer.decode import ContrastiveDecoding, DecodingSpec, fast_decoding

HELP = (
    "How to decode: greedy, 'sample temperature=0.7', 'beam num_beams=4', self-contrast, 'self-contrast beta=0.5 weak=rank=3', "
    "'contrastive amateur=FOLDER', dola, contrastive-search, with override=k=4 for another routing; or a YAML file (docs: Decodings). Options beside it fill in what it leaves open."
)
_SAMPLING_TEMPERATURE = 0.7


def decoding_of(text: str | None, **options: Any) -> DecodingSpec | None:
    """What the option says, with other options where it leaves something open; None without it.

    Raises:
        ConfigError: see `DecodingSpec.of`.
    """
    return None if text is None else _with_checkpoint(DecodingSpec.of(text, **options))


def decodings_of(texts: list[str] | None, *, samples: int, **options: Any) -> list[DecodingSpec]:
    """What the option says where it may be repeated and have braces, for so many samples of an answer.

    Raises:
        ConfigError: see `DecodingSpec.of`; for samples that would all be equal.
    """
    found = [_with_checkpoint(spec) for spec in DecodingSpec.grid_of(texts or [], **options)]
    return [_sampling(spec, samples) for spec in found] if samples > 1 else found


def _with_checkpoint(spec: DecodingSpec) -> DecodingSpec:
    """An amateur may be given as the output folder of a run, as every model of a command."""
    strategy = spec.strategy
    if not isinstance(strategy, ContrastiveDecoding) or not Path(strategy.amateur).is_dir():
        return spec  # names what is missing once it is loaded
    named = strategy.model_copy(update={"amateur": str(model_folder(Path(strategy.amateur)))})
    return spec.model_copy(update={"strategy": named})


@contextlib.contextmanager
def fast_decoding_of(*models: PreTrainedModel) -> Iterator[None]:
    """See `moesaic.fast_decoding`, for several models."""
    with contextlib.ExitStack() as stack:
        for model in models:
            stack.enter_context(fast_decoding(model))
        yield


def _sampling(spec: DecodingSpec, samples: int) -> DecodingSpec:
    if "temperature" not in spec.model_fields_set and (spec.strategy is None or spec.strategy.samples):
        spec = DecodingSpec.of(spec, temperature=_SAMPLING_TEMPERATURE)
    if not spec.temperature:
        raise ConfigError(
            "--samples", samples, f"of {spec.label!r} are all equal", "set a temperature, or leave it out"
        )
    return spec
