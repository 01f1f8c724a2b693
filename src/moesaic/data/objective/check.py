"""How much text fits a sequence under each denoiser, and what that needs of a run."""

from __future__ import annotations

from moesaic.data.objective.config import (
    UL2,
    CausalLM,
    MixedObjective,
    PrefixLM,
    SpanCorruption,
    StagedObjective,
    ul2_of,
)
from moesaic.data.objective.spans import Lengths, fitting
from moesaic.errors import ConfigError

AnyObjective = CausalLM | UL2 | MixedObjective | StagedObjective


def room(denoiser: SpanCorruption | PrefixLM, sequence_length: int) -> int:
    """Places of a sequence beside the mode token."""
    return sequence_length - (denoiser.mode is not None)


def lengths_in(denoiser: SpanCorruption, sequence_length: int) -> Lengths:
    """Sizes of the text that a sequence holds."""
    return fitting(room(denoiser, sequence_length), denoiser.noise_density, denoiser.mean_span)


def sentinels_needed(config: UL2, sequence_length: int) -> int:
    """Most spans that a denoiser makes in a sequence."""
    corrupting = [found for found in config.denoisers if isinstance(found, SpanCorruption)]
    return max((lengths_in(found, sequence_length).spans for found in corrupting), default=0)


def check_lengths(objective: AnyObjective, sequence_length: int) -> None:
    """Refuse sequences that are too short for a denoiser.

    Raises:
        ConfigError: naming the length.
    """
    for path, config in ul2_of(objective).items():
        for number, found in enumerate(config.denoisers):
            places = room(found, sequence_length)
            fits = places >= 2
            if isinstance(found, SpanCorruption):
                lengths = lengths_in(found, sequence_length)
                fits = lengths.inputs + lengths.targets <= places
            if not fits:
                where = ".".join(filter(None, ("objective", path, f"denoisers.{number}")))
                raise ConfigError("sequence_length", sequence_length, f"is too short for {where}", "use 16 or more")


def check_sentinels(objective: AnyObjective, sequence_length: int, reserved: int) -> None:
    """Refuse a tokenizer that is to be trained without the tokens that a UL2 mixture names.

    Args:
        objective: of the run.
        sequence_length: T.
        reserved: sentinels that the tokenizer gets.

    Raises:
        ConfigError: naming the number that is needed.
    """
    needed = [
        sentinels_needed(config, sequence_length)
        for config in ul2_of(objective).values()
        if config.reserved_from is None
    ]
    if needed and max(1, *needed, 0) > reserved:
        raise ConfigError(
            "tokenizer.sentinels",
            reserved,
            f"is fewer than the {max(1, *needed, 0)} that the objective needs in sequences of {sequence_length} tokens",
            "raise it, or set reserved_from in the objective",
        )


def check_stages(objective: AnyObjective, steps: int) -> None:
    """Refuse stages that a run does not reach.

    Raises:
        ConfigError: naming the stage.
    """
    if not isinstance(objective, StagedObjective):
        return
    for number, stage in enumerate(objective.stages):
        if stage.until_step is not None and stage.until_step >= steps:
            raise ConfigError(
                f"data.objective.stages.{number}.until_step",
                stage.until_step,
                f"does not end before the run of {steps} steps",
                f"choose 1 to {steps - 1}, or give `until` as a share",
            )
