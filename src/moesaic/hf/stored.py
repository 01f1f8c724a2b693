"""What a model folder holds, tensor by tensor: which part of which model tensor is on disk under which name.

It follows from transformers' own conversion to the names on disk, run on tensors without data, and so is what
`save_pretrained` would write. Sharded checkpoints are written and read by it, without any process that holds a model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from moesaic.errors import UnsupportedModel
from moesaic.hf.compat import revert_weight_conversion, without_tied_names


@dataclass(frozen=True)
class StoredTensor:
    """A tensor on disk: a box of a tensor of the model, with dimensions of one index left out and others reordered.

    Attributes:
        name: on disk.
        source: key in the model's state dict.
        shape: on disk.
        dtype: of the source.
        start: first index of the box in each dimension of the source.
        size: its extents there.
        order: which dimension of the source each dimension on disk is; None for one of size 1.
    """

    name: str
    source: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    start: tuple[int, ...]
    size: tuple[int, ...]
    order: tuple[int | None, ...]

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def from_source(self, box: Tensor) -> Tensor:
        """The tensor on disk as a view of its box of the source, or of a part of that; dimensions are kept that way."""
        kept = [dimension for dimension in self.order if dimension is not None]
        left_out = [dimension for dimension in range(box.ndim) if dimension not in kept]
        shape = [1 if dimension is None else box.shape[dimension] for dimension in self.order]
        return box.permute([*kept, *left_out]).reshape(shape)

    def slices(self, start: Sequence[int], size: Sequence[int]) -> tuple[slice, ...]:
        """Where a part of the box, given in indices of the source, lies on disk."""
        return tuple(
            slice(0, 1) if d is None else slice(start[d] - self.start[d], start[d] - self.start[d] + size[d])
            for d in self.order
        )


def stored_tensors(model: PreTrainedModel) -> list[StoredTensor]:
    """All tensors of the model's folder, by name.

    Args:
        model: whole or sharded, on any device. It is only looked at.

    Raises:
        UnsupportedModel: if its family joins, transposes or computes tensors on the way to disk in a way that is no
            selection of indices.
    """
    state = model.state_dict()
    ignored = set(model._keys_to_ignore_on_save or ())
    # The same tensor for the same parameter: that is how tied names are known.
    blanks: dict[int, Tensor] = {}
    blank_state: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name not in ignored:
            found = model.get_parameter_or_buffer(name)
            empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
            blank_state[name] = blanks.setdefault(id(found), empty)
    blank_state = without_tied_names(blank_state, model)
    sources = {blank.untyped_storage()._cdata: (name, blank) for name, blank in blank_state.items()}
    with _ViewsStayViews():
        on_disk = revert_weight_conversion(model, dict(blank_state))
    stored = [_described(name, tensor, sources) for name, tensor in on_disk.items()]
    _check_whole(stored, blank_state)
    return sorted(stored, key=lambda entry: entry.name)


def write_configs(model: PreTrainedModel, folder: Path) -> None:
    """Write what a model folder holds beside weights, as `save_pretrained` does.

    Raises:
        OSError: what the file system said.
    """
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    # FSDP makes subclasses whose names begin like this.
    model.config.architectures = [type(model).__name__.removeprefix("FSDP")]
    model.config.save_pretrained(folder)
    if model.can_generate() and model.generation_config is not None:
        model.generation_config.save_pretrained(folder)


def _described(name: str, tensor: Tensor, sources: Mapping[int, tuple[str, Tensor]]) -> StoredTensor:
    found = sources.get(tensor.untyped_storage()._cdata)
    box = None if found is None else _box(found[1], tensor)
    if found is None or box is None:
        raise UnsupportedModel(
            f"{name} is not a part of one tensor of the model: this family joins or computes it on the way to disk, which "
            "checkpoints of several processes do not support; use the backbone of another family, or one process"
        )
    return StoredTensor(name, found[0], tuple(tensor.shape), tensor.dtype, *box)


def _box(source: Tensor, view: Tensor) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int | None, ...]] | None:
    """Start, size and order of a view of a contiguous tensor, or None if it is no box of it."""
    start: list[int] = []
    offset = int(view.storage_offset())
    for stride in source.stride():
        first, offset = divmod(offset, stride) if stride else (0, offset)
        start.append(first)
    dimensions = {stride: d for d, stride in enumerate(source.stride()) if source.shape[d] > 1}
    size: list[int] = [1] * source.ndim
    order: list[int | None] = []
    for length, stride in zip(view.shape, view.stride(), strict=True):
        dimension = dimensions.get(stride) if length != 1 else None
        if length != 1 and (
            dimension is None or dimension in order or start[dimension] + length > source.shape[dimension]
        ):
            return None
        order.append(dimension)
        if dimension is not None:
            size[dimension] = length
    return tuple(start), tuple(size), tuple(order)


def _check_whole(stored: Sequence[StoredTensor], state: Mapping[str, Tensor]) -> None:
    numbers = dict.fromkeys(state, 0)
    for entry in stored:
        numbers[entry.source] += torch.Size(entry.shape).numel()
    for name, number in numbers.items():
        if number != state[name].numel():
            raise UnsupportedModel(
                f"{name} has {state[name].numel()} numbers, of which the family's names on disk hold {number}; "
                "use the backbone of another family"
            )


class _ViewsStayViews(TorchDispatchMode):
    """Copies that `contiguous` would make are left out, so that each result says where in its source it lies."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.clone.default:
            return torch.ops.aten.alias.default(args[0])
        return func(*args, **(kwargs or {}))
