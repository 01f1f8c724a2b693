"""State of the optimiser in torch's distributed format (DCP), by the names of parameters and in indices of whole tensors.

Which process held what is not part of it, so that any number of processes, in any layout, can read it: a packed
projection that is split over processes is written as the boxes that each of them holds.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.state_dict_saver import save

from moesaic.dist.checkpoint.boxes import Piece, Spread, local_part
from moesaic.dist.checkpoint.team import Team
from moesaic.errors import CheckpointError

METADATA_FILE = ".metadata"


class Part:
    """What this process holds of one tensor of the state.

    Attributes:
        spread: of the whole tensor.
        local: the numbers.
    """

    def __init__(self, spread: Spread, local: Tensor) -> None:
        self.spread, self.local = spread, local

    def pieces(self, rank: int) -> tuple[Piece, ...]:
        """Where they belong."""
        return self.spread.pieces(rank)


State = dict[str, Part]


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> State:
    """All state tensors of an optimiser as `<parameter>.<name>`, without copying them."""
    found = {}
    for name, parameter in _parameters(model, optimizer):
        for key, value in optimizer.state.get(parameter, {}).items():
            if not isinstance(value, Tensor):
                raise TypeError(f"{type(optimizer).__name__} keeps {key} as {type(value).__name__}; only tensors can be saved")
            found[f"{name}.{key}"] = Part(Spread.of(value), local_part(value))
    return found


def copied(state: State) -> State:
    """The same numbers in memory of their own, on the CPU."""
    return {name: Part(part.spread, part.local.detach().to("cpu", copy=True)) for name, part in state.items()}


def save_optimizer(state: State, folder: Path, team: Team) -> None:
    """Write the state into `folder`, a collective call of the team.

    Raises:
        OSError: if a process could not write.
    """
    writer = FileSystemWriter(folder, sync_files=True, overwrite=False)
    planner = _SavePlanner(team.rank)
    try:
        if team.group is not None:
            save(cast(Any, state), storage_writer=writer, planner=planner, process_group=team.group)
            return
        planner.set_up_planner(cast(Any, state), is_coordinator=True)
        writer.set_up_storage_writer(True)
        plans, metadata = planner.create_global_plan([writer.prepare_local_plan(planner.create_local_plan())])
        [plan] = writer.prepare_global_plan(plans)
        results = writer.write_data(planner.finish_plan(plan), planner).wait()
        writer.finish(metadata, [results])
    except CheckpointException as error:
        problem = next(iter(error.failures.values()))[0]
        raise OSError(getattr(problem, "strerror", None) or f"writing {folder.name} failed ({problem})") from error
    except RuntimeError as error:
        # torch's own file writer says no more than this when the disk is full.
        raise OSError(f"writing {folder.name} failed ({error})") from error


def load_optimizer(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Fill the optimiser with this process's part of a saved state; no process waits for another.

    A parameter that had no state, because it never had a gradient, gets none.

    Raises:
        CheckpointError: if a file is missing or damaged, or the state is that of another model.
    """
    reader = _Reader(folder)
    metadata = reader.checked_metadata()
    state: State = {}
    values: list[tuple[nn.Parameter, str, Tensor]] = []
    for name, parameter in _parameters(model, optimizer):
        for key, stored in _stored_of(name, metadata).items():
            value = _room(parameter, stored, optimizer, f"{name}.{key}", folder)
            state[f"{name}.{key}"] = Part(Spread.of(value), local_part(value))
            values.append((parameter, key, value))
    planner = _LoadPlanner(dist.get_rank() if dist.is_initialized() else 0)
    planner.set_up_planner(cast(Any, state), metadata, is_coordinator=True)
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    try:
        reader.read_data(reader.prepare_local_plan(planner.create_local_plan()), planner).wait()
    except Exception as error:  # torch raises errors of many kinds on damaged files.
        raise CheckpointError(f"{reader.reading} is damaged ({_short(error)}); {_REMEDY}") from error
    for parameter, key, value in values:
        optimizer.state[parameter][key] = value


_REMEDY = "remove the folder of the checkpoint to resume from the one before it"


def _parameters(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters of the optimiser with their names in the model."""
    trained = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter in trained)


def _stored_of(name: str, metadata: Metadata) -> dict[str, TensorStorageMetadata]:
    """The saved tensors of a parameter by the optimiser's names for them."""
    found = {}
    for fqn, stored in metadata.state_dict_metadata.items():
        parameter, _, key = fqn.rpartition(".")
        if parameter == name and isinstance(stored, TensorStorageMetadata):
            found[key] = stored
    return found


def _room(
    parameter: nn.Parameter, stored: TensorStorageMetadata, optimizer: torch.optim.Optimizer, name: str, folder: Path
) -> Tensor:
    """An empty state tensor: spread as the parameter, or a scalar where the optimiser keeps those."""
    if stored.size == parameter.shape:
        return torch.empty_like(parameter, dtype=stored.properties.dtype, requires_grad=False)
    if stored.size:
        raise CheckpointError(
            f"{folder} is of another model: {name} has shape {tuple(stored.size)} there and the parameter "
            f"{tuple(parameter.shape)} here"
        )
    group = next(group for group in optimizer.param_groups if any(parameter is other for other in group["params"]))
    on_device = group.get("fused") or group.get("capturable")
    return torch.empty((), dtype=stored.properties.dtype, device=parameter.device if on_device else "cpu")


class _SavePlanner(DefaultSavePlanner):
    """Writes each piece that a process holds; torch drops the same piece of other processes."""

    def __init__(self, rank: int) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._rank = rank

    def create_local_plan(self) -> SavePlan:
        items = []
        for name, part in cast(State, self.state_dict).items():
            properties = TensorProperties.create_from_tensor(part.local)
            items += [
                WriteItem(
                    index=MetadataIndex(name, piece.box.start),
                    type=WriteItemType.SHARD,
                    tensor_data=TensorWriteData(_chunk(piece), properties, torch.Size(part.spread.shape)),
                )
                for piece in part.pieces(self._rank)
            ]
        self.plan = SavePlan(items)
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return _held(cast(State, self.state_dict), index, self._rank)


class _LoadPlanner(DefaultLoadPlanner):
    """Reads into each piece that a process holds."""

    def __init__(self, rank: int) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._rank = rank

    def set_up_planner(self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        items: list[ReadItem] = []
        for name, part in cast(State, self.state_dict).items():
            stored = cast(TensorStorageMetadata, self.metadata.state_dict_metadata[name])
            chunks = [_chunk(piece) for piece in part.pieces(self._rank)]
            items += create_read_items_for_chunk_list(name, stored, chunks)
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return _held(cast(State, self.state_dict), index, self._rank)


class _Reader(FileSystemReader):
    """Reads metadata without running code that a file names, and knows which file it is at.

    Attributes:
        reading: the last file that was opened.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._folder = self.reading = folder

    def checked_metadata(self) -> Metadata:
        """The metadata, if all files it names are there and long enough.

        Raises:
            CheckpointError: names the file that is not.
        """
        file = self._folder / METADATA_FILE
        if not file.is_file():
            raise CheckpointError(f"{file} is missing; {_REMEDY}")
        try:
            metadata = self.read_metadata()
            ends: dict[str, int] = {}
            for place in cast(Mapping[Any, Any], metadata.storage_data).values():
                ends[place.relative_path] = max(ends.get(place.relative_path, 0), place.offset + place.length)
        except Exception as error:  # pickle raises errors of many kinds on damaged files.
            raise CheckpointError(f"{file} is damaged ({_short(error)}); {_REMEDY}") from error
        for name, end in sorted(ends.items()):
            path = self._folder / name
            if not path.is_file():
                raise CheckpointError(f"{path} is missing; {_REMEDY}")
            if path.stat().st_size < end:
                raise CheckpointError(
                    f"{path} is damaged: it has {path.stat().st_size} bytes where {end} were written; {_REMEDY}"
                )
        return metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (self._folder / METADATA_FILE).open("rb") as stream:
            return _PlainUnpickler(stream).load()

    def _slice_file(self, file: Any, sinfo: Any) -> IO[bytes]:
        self.reading = self._folder / sinfo.relative_path
        return super()._slice_file(file, sinfo)


class _PlainUnpickler(pickle.Unpickler):
    """Knows the classes of DCP's metadata and torch's descriptions of tensors, nothing that does anything."""

    _MODULES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem", "torch.serialization")
    _NAMES = frozenset(
        {
            ("torch", "Size"),
            ("torch", "device"),
            ("torch.serialization", "_get_layout"),
            ("pathlib", "PosixPath"),
            ("pathlib", "Path"),
        }
    )
    _CLASSES = frozenset(
        {
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "ChunkStorageMetadata",
            "BytesStorageMetadata",
            "MEM_FORMAT_ENCODING",
            "_MEM_FORMAT_ENCODING",
            "_StorageInfo",
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if dtype or (module, name) in self._NAMES or (module in self._MODULES and name in self._CLASSES):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} does not belong into metadata")


def _chunk(piece: Piece) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(piece.box.start), torch.Size(piece.box.size))


def _held(state: State, index: MetadataIndex, rank: int) -> Tensor:
    part = state[index.fqn]
    piece = next(piece for piece in part.pieces(rank) if torch.Size(piece.box.start) == index.offset)
    return piece.part(part.local, piece.box)


def _short(error: Exception) -> str:
    return f"{str(error).partition('. ')[0]:.200}"
