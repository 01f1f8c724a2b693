"""`TraceWriter`: rows to Parquet while a model runs, in bounded memory."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType

import pyarrow as pa
import pyarrow.parquet as pq

from moesaic.errors import TraceError
from moesaic.files import atomic_file
from moesaic.trace.header import TraceHeader
from moesaic.trace.rows import Rows
from moesaic.trace.storage.parquet import HEADER_KEY, NO_STEP, PART_KEY, schema, storage, to_table
from moesaic.trace.storage.parts import Part, PartFacts, header_difference, part_files, part_name, read_part

ROWS_PER_GROUP = 131_072
_BUFFERED_BYTES = 32 * 2**20
_WAITING = 2

MakeRows = Callable[[], Iterable[Rows]]


class TraceWriter:
    """Writes one process's parts of a trace, on a thread of its own.

    What it holds is bounded: 32 MB of rows, which are then written layer by layer, and what two calls have handed over
    and the thread has not taken yet. A part appears under its name when it is whole; what was recorded since is lost if
    the process is killed.

    Args:
        path: folder of the trace; made if it is missing.
        header: what is traced. Assign `header` when more domains or layers turn up.
        rank: number of this process among those that write the same trace.
        append: add to what is there. Without it a folder with parts is refused.
        part_bytes: a part that is larger is finished and another begun.

    Attributes:
        path: as given.
        header: as given; the width of the layers' selections grows with what is written.
        rank: as given.
        next_document: number of the document that comes next, for whoever appends later.

    Raises:
        TraceError: if there is a trace already and `append` is not set, or what is there is of another model.
    """

    def __init__(
        self,
        path: str | Path,
        header: TraceHeader,
        *,
        rank: int = 0,
        append: bool = False,
        part_bytes: int = 256 * 2**20,
    ) -> None:
        self.path, self.header, self.rank = Path(path), header, rank
        self._part_bytes = part_bytes
        there = _parts_of(self.path, header, append=append)
        mine = [part.facts for part in there if part.facts.rank == rank]
        self.next_document = max((facts.next_document for facts in mine), default=0)
        self._number = max((facts.number + 1 for facts in mine), default=0)
        self._empty = not mine
        self._schema = schema(has_scores=header.has_scores)
        self._buffer: dict[int, list[tuple[int, Rows]]] = defaultdict(list)
        self._buffered = 0
        self._part: _OpenPart | None = None
        self._error: BaseException | None = None
        self._queue: queue.Queue[Callable[[], None] | None] = queue.Queue(_WAITING)
        self._thread: threading.Thread | None = None

    def write(self, rows: Rows, *, step: int = NO_STEP) -> None:
        """Add rows of a layer; waits while the thread is two calls behind.

        Args:
            rows: their `domain_T` are numbers of `header.domains`.
            step: optimiser step in which they ran.

        Raises:
            TraceError: if something could not be written since the last call.
        """
        self.write_later(lambda: [rows], step=step)

    def write_later(self, make: MakeRows, *, step: int = NO_STEP) -> None:
        """As `write`, of rows that are made on the writer's thread."""

        def add() -> None:
            for rows in make():
                self._add(rows, step)

        self._submit(add)

    def finish_part(self) -> None:
        """Wait until all that was written so far is on disk, in whole parts.

        Raises:
            TraceError: if it could not be written.
        """
        if self._thread is not None:
            self._submit(self._finish_part)
            self._queue.join()
        self._raise_error()

    def close(self) -> None:
        """Finish the last part and end the thread; a trace without rows still has a part, which holds its header.

        Raises:
            TraceError: if something could not be written.
        """
        try:
            if self._error is None:
                self._submit(lambda: self._finish_part(last=True))
        finally:
            self._stop()
        self._raise_error()

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
            return
        # What was recorded before an error is worth keeping, and the error is what the user must see.
        with contextlib.suppress(TraceError):
            self.close()

    def _submit(self, task: Callable[[], None]) -> None:
        self._raise_error()
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="trace-writer", daemon=True)
            self._thread.start()
        self._queue.put(task)

    def _stop(self) -> None:
        thread, self._thread = self._thread, None
        if thread is not None:
            self._queue.put(None)
            thread.join()

    def _raise_error(self) -> None:
        if self._error is None:
            return
        if isinstance(self._error, pa.ArrowException | OSError):
            reason = getattr(self._error, "strerror", None) or self._error
            raise TraceError(
                f"cannot write the trace {self.path}: {reason}; parts that are there are whole. Free some space, or "
                "write elsewhere"
            ) from self._error
        raise self._error

    def _work(self) -> None:
        while True:
            task = self._queue.get()
            try:
                if task is None:
                    return
                if self._error is None:
                    task()
            except BaseException as error:
                self._error = error
                self._drop()
            finally:
                self._queue.task_done()

    # --- On the thread --------------------------------------------------------------------------------------------

    def _add(self, rows: Rows, step: int) -> None:
        if not len(rows):
            return
        self._buffer[rows.layer].append((step, rows))
        self._buffered += _size(rows)
        facts = self.header.layers[rows.layer]
        width = int((rows.choice_TK >= 0).sum(-1).max()) if rows.choice_TK.shape[1] > facts.top_k else 0
        if width > facts.top_k:
            layers = {**self.header.layers, rows.layer: facts.model_copy(update={"top_k": width})}
            self.header = self.header.model_copy(update={"layers": layers})
        if self._buffered >= _BUFFERED_BYTES:
            self._write_buffer()

    def _write_buffer(self) -> None:
        """Every layer's rows as row groups of their own, so that a reader of one layer reads nothing else."""
        buffer, self._buffer, self._buffered = self._buffer, defaultdict(list), 0
        for layer in sorted(buffer):
            self._part = self._part or _OpenPart(self.path / part_name(self.rank, self._number), self._schema)
            batches = buffer.pop(layer)
            table = to_table(batches, self.header.domains, has_scores=self.header.has_scores)
            self._part.write(table, [step for step, _ in batches])
        if self._part is not None and self._part.size >= self._part_bytes:
            self._finish_part()

    def _finish_part(self, *, last: bool = False) -> None:
        if self._buffer:
            self._write_buffer()
        if last and self._empty and self._part is None:
            self._part = _OpenPart(self.path / part_name(self.rank, self._number), self._schema)
        part, self._part = self._part, None
        if part is not None:
            part.finish(self.header, self.rank, self._number, self.next_document)
            self._number, self._empty = self._number + 1, False

    def _drop(self) -> None:
        """Forget what can't be written."""
        self._buffer.clear()
        part, self._part = self._part, None
        if part is not None:
            part.abandon()


class _OpenPart:
    """A part that is being written, under a temporary name."""

    def __init__(self, path: Path, columns: pa.Schema) -> None:
        self._stack = contextlib.ExitStack()
        self._temporary = self._stack.enter_context(atomic_file(path))
        try:
            self._writer = pq.ParquetWriter(self._temporary, columns, **storage(has_scores="scores" in columns.names))
        except BaseException:
            self.abandon()
            raise
        self.rows = 0
        self.first_step = self.last_step = NO_STEP

    @property
    def size(self) -> int:
        """Bytes written."""
        return self._temporary.stat().st_size

    def write(self, table: pa.Table, steps: list[int]) -> None:
        self._writer.write_table(table, row_group_size=ROWS_PER_GROUP)
        self.first_step = min(steps) if not self.rows else min(self.first_step, *steps)
        self.last_step = max(self.last_step, *steps)
        self.rows += len(table)

    def finish(self, header: TraceHeader, rank: int, number: int, next_document: int) -> None:
        facts = PartFacts(
            rank=rank,
            number=number,
            rows=self.rows,
            first_step=self.first_step,
            last_step=self.last_step,
            next_document=next_document,
        )
        with self._stack:
            self._writer.add_key_value_metadata(
                {HEADER_KEY: header.model_dump_json(), PART_KEY: facts.model_dump_json()}
            )
            self._writer.close()

    def abandon(self) -> None:
        """Remove the file."""
        with contextlib.suppress(Exception):
            self._writer.close()
        abandoned = RuntimeError("abandoned")
        self._stack.__exit__(type(abandoned), abandoned, None)


def _parts_of(path: Path, header: TraceHeader, *, append: bool) -> list[Part]:
    """What is there already, after checking that rows of `header` may be added to it."""
    if path.exists() and not path.is_dir():
        raise TraceError(f"{path} is a file; a trace is a folder: choose another path")
    files = part_files(path) if path.is_dir() else []
    if files and not append:
        raise TraceError(f"there is a trace in {path} already; choose another folder, or append=True to add to it")
    parts = [read_part(file) for file in files]
    for part in parts:
        difference = header_difference(part.header, header)
        if difference is not None:
            name, before, now = difference
            raise TraceError(
                f"{path} holds a trace of something else: {name} is {before!r} there and {now!r} here; "
                "write to another folder"
            )
    return parts


def _size(rows: Rows) -> int:
    tensors = (rows.choice_TK, rows.weight_TK, rows.dropped_TK, rows.scores_TM)
    return 25 * len(rows) + sum(tensor.nbytes for tensor in tensors if tensor is not None)
