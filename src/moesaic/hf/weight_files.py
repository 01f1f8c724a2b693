"""The safetensors files of a model folder: finding, checking and writing them without holding them in memory.

A file is 8 bytes with the length of its header, the header in JSON (name -> dtype, shape, offsets), then the tensors.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moesaic.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """A tensor in a file.

    Attributes:
        file: where it is.
        shape: its shape.
    """

    file: Path
    shape: tuple[int, ...]


def file_name(part: int, parts: int) -> str:
    """Name of one of several files, counted from 0, as `save_pretrained` names them."""
    return SINGLE if parts == 1 else f"model-{part + 1:05d}-of-{parts:05d}.safetensors"


def entries(folder: Path) -> dict[str, Entry]:
    """All tensors in the files of a folder, which are checked first.

    Raises:
        CheckpointError: names the file that is missing or damaged.
    """
    check_weight_files(folder)
    found = {}
    for file in weight_files(folder):
        header, _ = _header(file) or ({}, 0)
        found.update({name: Entry(file, tuple(entry["shape"])) for name, entry in header.items()})
    return found


def check_weight_files(folder: str | Path) -> None:
    """Check that the safetensors files of a model folder are all there and as long as their headers say.

    Raises:
        CheckpointError: names the first file that is missing or damaged.
    """
    for file in weight_files(Path(folder)):
        if not file.is_file():
            raise CheckpointError(f"{file} is missing; copy the checkpoint again or use another one")
        expected, actual = _size(file), file.stat().st_size
        if expected != actual:
            raise CheckpointError(
                f"{file} is damaged: it has {actual} bytes where its header says {expected or 'nothing readable'}; "
                f"copy the checkpoint again or use another one"
            )


def weight_files(folder: Path) -> list[Path]:
    """The files that a folder says it has.

    Raises:
        CheckpointError: if its index is damaged.
    """
    index = folder / INDEX
    if not index.is_file():
        return [folder / SINGLE]
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    except (ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{index} is damaged ({error}); copy the checkpoint again or use another one") from error
    return [folder / name for name in sorted(set(names))]


class WeightFile:
    """A safetensors file that is written tensor by tensor, in any order, with no more in memory than one of them.

    Args:
        path: to write.
        tensors: (name, dtype, shape) of all that it will hold.

    Raises:
        OSError: as `add` and `close`: what the file system said.
        TypeError: if a dtype has no name in this format.
    """

    def __init__(self, path: Path, tensors: Sequence[tuple[str, torch.dtype, Sequence[int]]]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._offsets: dict[str, int] = {}
        end = 0
        # Largest items first, so that every tensor is aligned to its own.
        for name, dtype, shape in sorted(tensors, key=lambda tensor: (-tensor[1].itemsize, tensor[0])):
            if dtype not in _NAMES:
                raise TypeError(f"{name} has dtype {dtype}, which safetensors files do not hold")
            start, end = end, end + torch.Size(shape).numel() * dtype.itemsize
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
            self._offsets[name] = start
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._data = 8 + len(text)
        self._file = path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)

    def add(self, name: str, tensor: Tensor) -> None:
        """Write one of the tensors."""
        self._file.seek(self._data + self._offsets.pop(name))
        self._file.write(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)

    def close(self) -> None:
        """Bring the file to the disk. All tensors must be there."""
        assert not self._offsets, f"{sorted(self._offsets)} were not written"
        with self._file:
            self._file.flush()
            os.fsync(self._file.fileno())

    def abandon(self) -> None:
        """Close a file that could not be written."""
        with contextlib.suppress(OSError):
            self._file.close()


def write_index(folder: Path, file_of: Mapping[str, str], metadata: Mapping[str, int]) -> None:
    """Write the index of a folder with several files."""
    content = {"metadata": dict(metadata), "weight_map": dict(sorted(file_of.items()))}
    (folder / INDEX).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _size(file: Path) -> int | None:
    """Size of a whole file by its own header."""
    found = _header(file)
    if found is None:
        return None
    header, start = found
    try:
        return start + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (KeyError, TypeError, IndexError):
        return None


def _header(file: Path) -> tuple[dict[str, Any], int] | None:
    """What a file says it holds, and where the tensors begin; None if that can't be read."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 0 < length <= file.stat().st_size - 8:
            return None
        try:
            header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
        except (ValueError, AttributeError):
            return None
    return header, 8 + length
