"""A model and its optimiser on their way to disk: from the memory that training uses, or copied to write later."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moesaic.dist.checkpoint.optimizer import State, copied, optimizer_state, save_optimizer
from moesaic.dist.checkpoint.shares import Shares
from moesaic.dist.checkpoint.team import Team
from moesaic.hf.stored import StoredTensor, write_configs
from moesaic.hf.weight_files import WeightFile, file_name, write_index

OPTIMIZER = "optimizer"


class Snapshot:
    """What this process writes of a model and its optimiser.

    Args:
        model: whole or sharded.
        optimizer: over its parameters.
        team: all processes.
        copy: copy to the memory of the host now, which takes as much as is written; then `write` may run in another
            thread while training goes on. Else tensors are collected as they are written, one at a time.
    """

    def __init__(
        self, model: PreTrainedModel, optimizer: torch.optim.Optimizer, team: Team, *, copy: bool = False
    ) -> None:
        self._model, self._team = model, team
        self._shares = Shares(model, team.size)
        self._tensors: Iterable[tuple[StoredTensor, Tensor]] = self._shares.collect(model, team.rank)
        self._optimizer: State = optimizer_state(model, optimizer)
        if copy:
            self._tensors = [(entry, tensor.to("cpu", copy=True)) for entry, tensor in self._tensors]
            self._optimizer = copied(self._optimizer)

    def write(self, folder: Path) -> None:
        """Write the model folder and, in it, the optimiser's; every process of the team calls this once.

        Raises:
            WriteFailed: on all processes, if one could not write.
        """
        self._team.together(lambda: self._write_weights(folder))
        if self._team.rank == 0:
            self._team.together(lambda: self._write_index(folder))
        else:
            self._team.together(lambda: None)
        self._team.together(lambda: save_optimizer(self._optimizer, folder / OPTIMIZER, self._team))

    def _write_weights(self, folder: Path) -> None:
        own = [(entry.name, entry.dtype, entry.shape) for entry in self._shares.of(self._team.rank)]
        file: WeightFile | None = None
        problem: OSError | None = None
        # To the end whatever happens, since the others wait for this process's parts.
        for entry, tensor in self._tensors:
            if problem is None:
                try:
                    file = file or WeightFile(self._path(folder, self._team.rank), own)
                    file.add(entry.name, tensor)
                except OSError as error:
                    problem = error
        if file is not None:
            if problem is None:
                file.close()
            else:
                file.abandon()
        if problem is not None:
            raise problem

    def _write_index(self, folder: Path) -> None:
        write_configs(self._model, folder)
        if self._team.size > 1:
            stored = self._shares.stored
            file_of = {entry.name: self._path(folder, self._shares.writer[entry.name]).name for entry in stored}
            write_index(folder, file_of, {"total_size": sum(entry.nbytes for entry in stored)})

    def _path(self, folder: Path, rank: int) -> Path:
        return folder / file_name(rank, self._team.size)
