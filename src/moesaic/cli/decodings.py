"""The option --decode of commands that generate."""

from __future__ import annotations

from typing import Any

from moesaic.infer.decode import DecodingSpec

HELP = (
    "How to decode: greedy, 'sample temperature=0.7', 'beam num_beams=4', self-contrast, 'self-contrast beta=0.5 weak=rank=3', "
    "with override=k=4 for another routing; or a YAML file (docs: Decodings). Options beside it fill in what it leaves open."
)


def decoding_of(text: str | None, **options: Any) -> DecodingSpec | None:
    """What the option says, with other options where it leaves something open; None without it.

    Raises:
        ConfigError: see `DecodingSpec.of`.
    """
    return None if text is None else DecodingSpec.of(text, **options)
