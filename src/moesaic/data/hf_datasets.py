"""Documents from HF `datasets`, streamed or loaded."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

from moesaic.data.config import DatasetsSource
from moesaic.data.documents import Document
from moesaic.data.text_files import text_value
from moesaic.errors import DataError


def read_dataset(source: DatasetsSource) -> Iterator[Document]:
    """Rows of a dataset, one at a time; with `streaming` nothing but the current block of rows is in memory.

    Raises:
        DataError: if the library is not installed, the dataset cannot be opened, or a row lacks a field.
    """
    name = f"dataset {source.path!r} ({source.split})"
    rows = iter(_open(source))
    for number in itertools.count():
        with _readable_errors(f"reading {name} failed at row {number}"):
            row = next(rows, None)
        if row is None:
            return
        origin = f"{name} row {number}"
        text = text_value(row, source.text_field, "text_field", origin)
        domain = source.domain
        if source.domain_field is not None:
            domain = text_value(row, source.domain_field, "domain_field", origin)
        yield Document(text, domain, origin)


def _open(source: DatasetsSource) -> Any:
    try:
        import datasets
    except ImportError:
        raise DataError(
            'a source of type `datasets` needs the datasets library; install it: pip install "moesaic[train]"'
        ) from None
    data_files = source.model_dump(mode="json")["data_files"]
    with _readable_errors(
        f"cannot open dataset {source.path!r} (name={source.name!r}, split={source.split!r}, data_files={data_files!r})"
    ):
        return datasets.load_dataset(
            source.path,
            name=source.name,
            data_files=data_files,
            split=source.split,
            revision=source.revision,
            streaming=source.streaming,
        )


@contextlib.contextmanager
def _readable_errors(what: str) -> Iterator[None]:
    """Turn what datasets raises for a wrong name, split, file or connection, or a file that does not parse."""
    from datasets.exceptions import DatasetsError

    try:
        yield
    except (OSError, ValueError, DatasetsError) as error:
        raise DataError(f"{what}: {error}; check these fields, the files and the connection") from error
