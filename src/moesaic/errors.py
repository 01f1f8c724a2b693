"""Errors a user can act on: each names what is wrong, the value, and what would work.

The command line turns every `MoesaicError` into one readable message and exit code 2.
"""

from __future__ import annotations

from typing import Any


class MoesaicError(Exception):
    """Base of all errors that moesaic raises on purpose."""


class ConfigError(MoesaicError, ValueError):
    """A configuration field holds a value that cannot be used.

    Args:
        field: dotted path of the field, e.g. `moe.router.top_k`.
        value: the value found there.
        problem: what is wrong, as the end of a sentence ("is larger than num_experts (8)").
        remedy: what would work ("choose a value from 1 to 8").
    """

    def __init__(self, field: str, value: Any, problem: str, remedy: str) -> None:
        self.field, self.value, self.problem, self.remedy = field, value, problem, remedy
        super().__init__(f"{field} = {value!r} {problem}; {remedy}")


class DataError(MoesaicError, ValueError):
    """A data source is missing, empty or malformed."""


class CheckpointError(MoesaicError, RuntimeError):
    """A checkpoint is missing, damaged, or belongs to another model."""


class TrainingError(MoesaicError, RuntimeError):
    """Training cannot go on (a loss that is not finite, a run directory that belongs to another run)."""


class TraceError(MoesaicError, ValueError):
    """A trace is missing, damaged, of another format, or belongs to another model, tokenizer or text."""


class UnsupportedModel(MoesaicError, ValueError):
    """A transformers model that moesaic can't take apart; the message says why and names families that work."""


class UnsupportedExport(MoesaicError, ValueError):
    """A model that its stock transformers family cannot express exactly; the message says which part."""


class UnsupportedKernel(MoesaicError, ValueError):
    """No expert kernel can run these weights on this input; the message lists each kernel's reason."""


class UnsupportedOverride(MoesaicError, ValueError):
    """A model or router whose picks or weights can't be given from outside; the message says why and what would work."""


class UnsupportedDecoding(MoesaicError, ValueError):
    """A model that can't generate token by token; the message says what its routing depends on."""

    def __init__(self, reason: str) -> None:
        super().__init__(
            f"{reason}. So decoding token by token would route otherwise than training did; "
            "use a router that docs/routers calls servable, or score whole sequences"
        )
