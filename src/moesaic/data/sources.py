"""From a source's configuration to its documents, and to a fingerprint that changes when they may have changed."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from moesaic.data.config import DatasetsSource, JsonlSource, ProblemsSource, PythonSource, Source, TextSource
from moesaic.data.documents import Document, capped
from moesaic.data.hf_datasets import read_dataset
from moesaic.data.problems import PROBLEMS_VERSION, read_problems
from moesaic.data.python_corpus import read_code, read_prose, read_tables
from moesaic.data.python_docs import read_chat, read_documentation, read_numbers
from moesaic.data.text_files import find_files, read_jsonl, read_text

_PYTHON_DOMAINS = {
    "prose": read_prose,
    "code": read_code,
    "tables": read_tables,
    "documentation": read_documentation,
    "chat": read_chat,
    "numbers": read_numbers,
}


def read_documents(sources: Iterable[Source]) -> Iterator[Document]:
    """All documents of all sources, lazily and always in the same order; blank ones are left out.

    Raises:
        DataError: when a source is missing or malformed; the message names file and line.
    """
    for source in sources:
        if isinstance(source, PythonSource):
            for domain in source.domains:
                yield from capped(_PYTHON_DOMAINS[domain](), max_bytes=source.max_bytes)
        elif isinstance(source, ProblemsSource):
            for domain in source.domains:
                yield from read_problems(source, domain)
        else:
            yield from capped(_read(source), max_documents=source.max_documents, max_bytes=source.max_bytes)


def fingerprint(source: Source) -> Any:
    """JSON-able value that differs when the source's local files (name, size, time) or Python version differ.

    A dataset on the hub is known by its configuration alone: set `revision` to follow its changes.

    Raises:
        DataError: for a path at which there is nothing.
    """
    if isinstance(source, PythonSource):
        return sys.version
    if isinstance(source, ProblemsSource):
        return PROBLEMS_VERSION
    if isinstance(source, TextSource | JsonlSource):
        return _stamps(find_files(source.paths))
    return _stamps(_local_files(source))


def _read(source: TextSource | JsonlSource | DatasetsSource) -> Iterator[Document]:
    if isinstance(source, TextSource):
        return read_text(source)
    if isinstance(source, JsonlSource):
        return read_jsonl(source)
    return read_dataset(source)


def _local_files(source: DatasetsSource) -> list[Path]:
    """Files of this machine that the dataset names; patterns and addresses it resolves itself are not among them."""
    named = source.data_files
    if named is None:
        named = source.path
    groups = list(named.values()) if isinstance(named, dict) else [named]
    paths = [Path(path) for group in groups for path in ([group] if isinstance(group, str) else group)]
    return find_files(str(path) for path in paths if path.exists())


def _stamps(files: Iterable[Path]) -> list[tuple[str, int, int]]:
    stats = ((path, path.stat()) for path in files)
    return [(str(path.resolve()), stat.st_size, stat.st_mtime_ns) for path, stat in stats]
