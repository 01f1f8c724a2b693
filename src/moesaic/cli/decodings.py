"""The option --decode of commands that generate."""

from __future__ import annotations

from typing import Any

from moesaic.errors import ConfigError
from moesaic.infer.decode import DecodingSpec

HELP = (
    "How to decode: greedy, 'sample temperature=0.7', 'beam num_beams=4', self-contrast, 'self-contrast beta=0.5 weak=rank=3', "
    "with override=k=4 for another routing; or a YAML file (docs: Decodings). Options beside it fill in what it leaves open."
)
_SAMPLING_TEMPERATURE = 0.7


def decoding_of(text: str | None, **options: Any) -> DecodingSpec | None:
    """What the option says, with other options where it leaves something open; None without it.

    Raises:
        ConfigError: see `DecodingSpec.of`.
    """
    return None if text is None else DecodingSpec.of(text, **options)


def decodings_of(texts: list[str] | None, *, samples: int, **options: Any) -> list[DecodingSpec]:
    """What the option says where it may be repeated and have braces, for so many samples of an answer.

    Raises:
        ConfigError: see `DecodingSpec.of`; for samples that would all be equal.
    """
    found = DecodingSpec.grid_of(texts or [], **options)
    return [_sampling(spec, samples) for spec in found] if samples > 1 else found


def _sampling(spec: DecodingSpec, samples: int) -> DecodingSpec:
    if "temperature" not in spec.model_fields_set and (spec.strategy is None or spec.strategy.samples):
        spec = DecodingSpec.of(spec, temperature=_SAMPLING_TEMPERATURE)
    if not spec.temperature:
        raise ConfigError(
            "--samples", samples, f"of {spec.label!r} are all equal", "set a temperature, or leave it out"
        )
    return spec
