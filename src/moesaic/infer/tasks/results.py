"""Results item by item, a JSON object a line; a file that was cut short is gone on with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from moesaic.errors import DataError
from moesaic.files import write_text

Row = Mapping[str, Any]


class ResultsFile:
    """A file of results, to which rows are added as they come.

    Every row names the run that made it and what its item was, so that rows of another model, of other settings or of a
    changed task are never taken for this run's.

    Args:
        path: of the file; made with the first row.
        run: what identifies the run: model, decoding, seed and so on.

    Raises:
        DataError: if there is a file of another run, or one that holds something else.
    """

    def __init__(self, path: str | Path, run: Mapping[str, Any]) -> None:
        self.path, self._run = Path(path), digest(run)
        self._rows: dict[tuple[str, str], Row] = {}
        if self.path.exists():
            kept = list(_read(self.path, cut_short=True))
            for row in kept:
                if row["run"] != self._run:
                    raise DataError(
                        f"results = {str(self.path)!r} is of another model or other settings; choose another file, or "
                        f"remove it"
                    )
                self._rows[row["task"], row["id"]] = row
            # Without what was only half written.
            write_text(self.path, "".join(map(_line, kept)))

    def find(self, task: str, name: str, item: str) -> Row | None:
        """The row of an item of this content, if it is there.

        Raises:
            DataError: if there is one of an item that had another content.
        """
        row = self._rows.get((task, name))
        if row is not None and row["item"] != item:
            raise DataError(
                f"results = {str(self.path)!r} has item {name!r} of task {task!r} as it was before the task changed; "
                f"choose another file, or remove it"
            )
        return row

    def add(self, rows: Iterable[Row]) -> Sequence[Row]:
        """Add rows, and give them as they were written."""
        named = [{**row, "run": self._run} for row in rows]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(map(_line, named)))
        for row in named:
            self._rows[row["task"], row["id"]] = row
        return named


def read_results(path: str | Path) -> list[Row]:
    """The rows of a results file.

    Raises:
        DataError: if there is no such file, or it holds something else.
    """
    if not Path(path).is_file():
        raise DataError(f"results = {str(path)!r} is not a file; give what --output wrote")
    return list(_read(Path(path), cut_short=False))


def digest(value: Mapping[str, Any]) -> str:
    """A short name of what a mapping of plain values holds."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _read(path: Path, *, cut_short: bool) -> Iterable[Row]:
    text = path.read_text(encoding="utf-8", errors="replace")
    lines = text.split("\n")
    for number, line in enumerate(lines, start=1):
        if not line or (cut_short and number == len(lines)):
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        if not isinstance(row, dict) or not {"run", "task", "id", "item", "correct"} <= row.keys():
            raise DataError(f"{path}, line {number}: is not a result of `moesaic eval`; choose another file")
        yield row


def _line(row: Row) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"
