"""Reading a model folder into a sharded model: every process reads the slices that it holds, nothing else."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from moesaic.dist.checkpoint.boxes import Box, Spread, local_part
from moesaic.errors import CheckpointError
from moesaic.hf.stored import StoredTensor, stored_tensors
from moesaic.hf.weight_files import Entry, entries
from moesaic.layer import Router


@torch.no_grad()
def load_weights(model: PreTrainedModel, folder: str | Path, rank: int = 0) -> int:
    """Fill a model's parameters and persistent buffers from a model folder, without any process reading all of it.

    Args:
        model: built from the folder's config, sharded or not, with memory on its device (whatever is in there).
        folder: with safetensors files, in any number.
        rank: of this process.

    Returns:
        How many bytes were read.

    Raises:
        CheckpointError: if a file is missing or damaged, or the folder holds other tensors than such a model is saved as.
        UnsupportedModel: if the model's family joins tensors on the way to disk.
    """
    folder = Path(folder)
    stored, on_disk = stored_tensors(model), entries(folder)
    _check_names(model, folder, stored, on_disk)
    state, read = model.state_dict(), 0
    with contextlib.ExitStack() as stack:
        files: dict[Path, Any] = {}
        for entry in stored:
            file = on_disk[entry.name].file
            if file not in files:
                files[file] = stack.enter_context(safe_open(file, framework="pt"))
            read += _fill(state[entry.source], entry, files[file], rank)
    for module in model.modules():
        if isinstance(module, Router):
            module.freeze()
    return read


def _fill(tensor: Tensor, entry: StoredTensor, file: Any, rank: int) -> int:
    """Copy what this process holds of a tensor from disk; the number of bytes read."""
    local, box, read = local_part(tensor), Box(entry.start, entry.size), 0
    for piece in Spread.of(tensor).pieces(rank):
        overlap = piece.box.overlap(box)
        if overlap is None:
            continue
        # A slice of a tensor without dimensions is none.
        if entry.shape:
            found = file.get_slice(entry.name)[entry.slices(overlap.start, overlap.size)]
        else:
            found = file.get_tensor(entry.name)
        read += found.nbytes
        target = entry.from_source(piece.part(local, overlap))
        assert target.untyped_storage().data_ptr() == local.untyped_storage().data_ptr()
        target.copy_(found)
    return read


def _check_names(
    model: PreTrainedModel, folder: Path, stored: list[StoredTensor], on_disk: dict[str, Entry]
) -> None:
    known = {entry.name: entry.shape for entry in stored}
    missing = sorted(known.keys() - on_disk.keys())
    if missing:
        raise CheckpointError(
            f"{folder} can't be read into shards: {len(missing)} tensors are not there under the names that this model is "
            f"saved with, first {missing[0]}; it belongs to another model or has an older layout: load it with "
            "transformers and save it again, or use moesaic convert"
        )
    for name, shape in known.items():
        if on_disk[name].shape != shape:
            raise CheckpointError(
                f"{folder} does not fit its config.json: {name} has shape {on_disk[name].shape} instead of {shape}"
            )
    ignored = [*(model._keys_to_ignore_on_load_unexpected or ()), *(model._tied_weights_keys or ())]
    foreign = sorted(
        name for name in on_disk.keys() - known.keys() if not any(re.search(pattern, name) for pattern in ignored)
    )
    if foreign:
        raise CheckpointError(
            f"{folder} does not fit its config.json: {len(foreign)} unexpected tensors, first {foreign[0]}"
        )
