"""How the strong and the weak logits of a decoding step are computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from moesaic.errors import ConfigError

# Keywords of a forward pass that have no rows, although the length of some may be that of the batch.
_NO_ROWS = frozenset({"past_key_values", "cache_position", "logits_to_keep"})


class Passes(Protocol):
    """The passes of one generation, which knows its own caches.

    Attributes:
        weak_WV: weak logits of the rows that have a weak pass, (W, V), after each step.
    """

    weak_WV: Tensor

    def __call__(self, inputs: dict[str, Any], /) -> Any:
        """Run all passes of a step; the output is that of the strong one."""
        ...

    def reorder(self, cache: Any, rows_B: Tensor, /) -> Any:
        """See `moesaic.hf.generation_view.Step`."""
        ...


def batch_of(inputs: Mapping[str, Any]) -> int:
    """The number of rows of a forward pass."""
    given = inputs.get("input_ids")
    return (inputs["inputs_embeds"] if given is None else given).shape[0]


def rows_of(inputs: Mapping[str, Any], rows_R: Tensor) -> dict[str, Any]:
    """The inputs of a forward pass for other rows: row r is what row `rows_R[r]` was."""
    batch = batch_of(inputs)
    return {name: value if name in _NO_ROWS else _rows(name, value, rows_R, batch) for name, value in inputs.items()}


def _rows(name: str, value: Any, rows_R: Tensor, batch: int) -> Any:
    if isinstance(value, Mapping):  # masks by kind of layer
        return {kind: _rows(name, part, rows_R, batch) for kind, part in value.items()}
    if not isinstance(value, Tensor) or not value.dim():
        return value
    axis = 1 if name == "position_ids" and value.dim() == 3 else 0  # position ids of several axes have the batch second
    if value.shape[axis] == batch:
        return value.index_select(axis, rows_R.to(value.device))
    if value.shape[axis] != 1 and len(rows_R) != batch:
        raise ConfigError(
            name, tuple(value.shape), f"has no entry for each of {batch} rows", "decode one prompt at a time"
        )
    return value


def output_rows(output: Any, rows_B: Tensor, batch: int) -> Any:
    """A model's output with these rows of its batch only; the cache keeps all of them."""
    for name, value in output.items():
        if name not in _NO_ROWS and value is not None:
            output[name] = _output_rows(value, rows_B, batch)
    return output


def _output_rows(value: Any, rows_B: Tensor, batch: int) -> Any:
    if isinstance(value, tuple):
        return tuple(_output_rows(part, rows_B, batch) for part in value)
    if not isinstance(value, Tensor) or not value.dim() or value.shape[0] % batch:
        return value
    # Router logits have a row for each token.
    return value.unflatten(0, (batch, -1)).index_select(0, rows_B.to(value.device)).flatten(0, 1)


def check_fresh(inputs: Mapping[str, Any], rows: int) -> None:
    """Refuse a cache that already holds tokens, which the weak pass would lack, or memory for another batch.

    Args:
        inputs: of the first forward pass.
        rows: that the passes need of the cache.

    Raises:
        ConfigError: if it does.
    """
    cache = inputs.get("past_key_values")
    length = 0 if cache is None else int(cache.get_seq_length())
    if length:
        raise ConfigError(
            "past_key_values",
            f"{length} tokens",
            "are those of one pass, and a decoding of two passes needs them of both",
            "give the whole prompt and no cache",
        )
    for layer in getattr(cache, "layers", ()):
        keys = getattr(layer, "keys", None)
        if isinstance(keys, Tensor) and keys.dim() and keys.shape[0] not in (0, rows):
            raise ConfigError(
                "past_key_values",
                f"memory for {keys.shape[0]} rows",
                f"does not fit the {rows} rows that are decoded",
                "leave the allocation to the first forward pass (no prefill_chunk_size with a static cache), or use "
                "plan='two_passes'",
            )


def places(rows: Sequence[int], device: torch.device) -> Tensor:
    """Numbers of rows as a tensor."""
    return torch.tensor(rows, dtype=torch.long, device=device)
