"""`TraceFile`: a trace on disk, read lazily."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import nn

from moesaic.errors import TraceError
from moesaic.trace.checks import check_model, check_tokenizer
from moesaic.trace.header import TraceHeader
from moesaic.trace.rows import Rows
from moesaic.trace.storage.parquet import columns_of, schema, to_rows
from moesaic.trace.storage.parts import Part, damaged, joined_header, part_files, read_part


class TraceFile:
    """A trace that `record(model, path)` or `TraceWriter` wrote: a `RoutingLog` that reads as it goes.

    Opening it reads what the parts say of themselves and no rows.

    Args:
        path: the folder, or one of its parts.

    Attributes:
        path: as given.
        header: what was traced, in all parts together.
        parts: the parts, by process and number.

    Raises:
        TraceError: if there is no trace, a part is damaged or cut short or of a newer format, or parts belong to
            different models.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        files = [self.path] if self.path.is_file() else part_files(self.path)
        if not files:
            problem = "has no part-*.parquet" if self.path.is_dir() else "does not exist"
            raise TraceError(
                f"{self.path} is not a trace: it {problem}; give the folder that moesaic.record(model, path) wrote"
            )
        self.parts: list[Part] = [read_part(file) for file in files]
        self.header: TraceHeader = joined_header(self.parts)

    def __len__(self) -> int:
        """Rows, one for each token and layer."""
        return sum(part.facts.rows for part in self.parts)

    def rows(
        self,
        layers: Collection[int] | None = None,
        *,
        documents: Collection[int] | None = None,
        weights: bool = True,
        scores: bool = True,
    ) -> Iterator[Rows]:
        """Every row once; see `RoutingLog`. Row groups of other layers and documents are not read.

        Args:
            layers: only these layers; None for all.
            documents: only these documents; None for all.
            weights: read the weights. Without them `weight_TK` is NaN, and reading takes a fifth of the time.
            scores: read the scores, if the trace has them.

        Raises:
            TraceError: if a part turns out to be damaged.
        """
        numbers = {name: number for number, name in enumerate(self.header.domains)}
        top_k = {index: facts.top_k for index, facts in self.header.layers.items()}
        names = columns_of(weights=weights, scores=scores and self.header.has_scores)
        wanted_D = None if documents is None else torch.tensor(sorted(set(documents)), dtype=torch.int64)
        for table in self.tables(names, layers, documents):
            for rows in to_rows(table, numbers, top_k, weights=weights):
                if layers is not None and rows.layer not in layers:
                    continue
                if wanted_D is not None:
                    rows = rows[torch.isin(rows.tokens.document_T, wanted_D)]
                if len(rows):
                    yield rows

    def tables(
        self,
        columns: list[str] | None = None,
        layers: Collection[int] | None = None,
        documents: Collection[int] | None = None,
    ) -> Iterator[pa.Table]:
        """The row groups as Arrow tables, for other tools.

        Args:
            columns: names of columns; None for all.
            layers: leave out row groups that have none of these layers.
            documents: leave out row groups that have none of these documents.

        Raises:
            TraceError: if a part turns out to be damaged.
        """
        for part in self.parts:
            groups = [
                group
                for group in range(part.metadata.num_row_groups)
                if _may_have(part, group, "layer", layers) and _may_have(part, group, "document", documents)
            ]
            if not groups:
                continue
            try:
                with pq.ParquetFile(part.path, metadata=part.metadata, page_checksum_verification=True) as file:
                    for group in groups:
                        yield file.read_row_group(group, columns=columns)
            except (pa.ArrowException, OSError) as error:
                raise damaged(part.path, error) from error

    def check_model(self, model: nn.Module) -> None:
        """Check that the trace is of this model; see `moesaic.trace.check_model`."""
        check_model(self, model)

    def check_tokenizer(self, tokenizer: Any) -> None:
        """Check that this tokenizer made the ids; see `moesaic.trace.check_tokenizer`."""
        check_tokenizer(self, tokenizer)


def _may_have(part: Part, group: int, column: str, values: Collection[int] | None) -> bool:
    """Whether a row group may have one of the values, by what is written of the column's least and largest."""
    if values is None:
        return True
    statistics = part.metadata.row_group(group).column(_PLACES[column]).statistics
    if statistics is None or not statistics.has_min_max:
        return True
    return any(statistics.min <= value <= statistics.max for value in values)


_PLACES = {name: place for place, name in enumerate(schema(has_scores=False).names)}
