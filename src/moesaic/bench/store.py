"""The file of results: written after each cell, whole or not at all."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moesaic.bench.cases import Cell
from moesaic.bench.result import CellResult
from moesaic.errors import ConfigError, DataError
from moesaic.files import write_text

FORMAT = 1
NAME = "bench.json"


@dataclass
class Saved:
    """A file of results.

    Attributes:
        machine: machine and versions in a sentence.
        commands: how the runs that filled it were started.
        results: by cell.
    """

    machine: str
    commands: list[str] = field(default_factory=list)
    results: dict[Cell, CellResult] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "moesaic_bench": FORMAT,
            "machine": self.machine,
            "commands": self.commands,
            "results": [result.to_dict() for result in self.results.values()],
        }


class Store(Saved):
    """Results of runs on one machine with one set of versions, written with each result.

    Args:
        path: the file, made with the first result.
        machine: machine and versions in a sentence.
        command: how the run was started.
        restart: forget earlier results of another machine instead of refusing them.

    Raises:
        ConfigError: if the file holds results of another machine or other versions.
        DataError: if it can't be read.
    """

    def __init__(self, path: Path, machine: str, command: str, *, restart: bool = False) -> None:
        super().__init__(machine)
        self.path = path
        if path.exists():
            earlier = read(path)
            if earlier.machine == machine:
                self.commands, self.results = earlier.commands, earlier.results
            elif not restart:
                raise ConfigError(
                    "--output",
                    str(path.parent),
                    f"holds results of {earlier.machine}, and this is {machine}",
                    "choose another folder, or --restart",
                )
        self._command = command

    def keep(self, result: CellResult) -> None:
        """Add or replace a result and write the file."""
        self.results[result.cell] = result
        if self._command not in self.commands:
            self.commands.append(self._command)
        write_text(self.path, json.dumps(self.to_dict(), indent=1) + "\n")


def read(path: Path) -> Saved:
    """Read a file of results.

    Raises:
        DataError: if it is not one.
        OSError: if it isn't there.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["moesaic_bench"] != FORMAT:
            raise DataError(f"{path} has format {values['moesaic_bench']}, this version reads {FORMAT}; measure anew")
        found = [CellResult.from_dict(result) for result in values["results"]]
        return Saved(values["machine"], values["commands"], {result.cell: result for result in found})
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} is no file of results of `moesaic bench` ({error}); give its {NAME}") from None
