"""Documents from text and JSONL files."""

from __future__ import annotations

import glob
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

from moesaic.data.config import JsonlSource, TextSource
from moesaic.data.documents import Document
from moesaic.errors import DataError

_READ_CHARACTERS = 2**20


def find_files(paths: Iterable[str]) -> list[Path]:
    """Files named by paths, folders (recursively, without hidden files) and globs; each once, folders sorted.

    Raises:
        DataError: for a path at which there is nothing.
    """
    found: dict[Path, None] = {}
    for text in paths:
        path = Path(text).expanduser()
        if path.is_file():
            files = [path]
        elif path.is_dir():
            files = [file for file in path.rglob("*") if file.is_file() and not _is_hidden(file.relative_to(path))]
        else:
            files = [Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file()]
        if not files:
            raise DataError(
                f"no file at {text!r} (looked from {Path.cwd()}); give a file, a folder with files, or a glob"
            )
        found.update(dict.fromkeys(sorted(files)))
    return list(found)


def read_text(source: TextSource) -> Iterator[Document]:
    """Documents of text files.

    Raises:
        DataError: for a missing path, or a file that is not UTF-8.
    """
    for path in find_files(source.paths):
        with path.open(encoding="utf-8-sig") as file:
            try:
                for number, text in enumerate(_split(file, source.separator), start=1):
                    origin = str(path) if source.separator is None else f"{path}#{number}"
                    yield Document(text, source.domain, origin)
            except UnicodeDecodeError as error:
                raise _not_utf8(path, error) from None


def read_jsonl(source: JsonlSource) -> Iterator[Document]:
    """Documents of JSONL files.

    Raises:
        DataError: for a missing path, a file that is not UTF-8, or (with its line number) a line that is not a JSON
            object or lacks a field.
    """
    for path in find_files(source.paths):
        with path.open(encoding="utf-8-sig") as file:
            try:
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        yield _parse(line, f"{path}:{number}", source)
            except UnicodeDecodeError as error:
                raise _not_utf8(path, error) from None


def text_value(row: Any, field: str, setting: str, origin: str) -> str:
    """The text at `row[field]`.

    Args:
        row: a JSON object or a row of a dataset.
        field: key to read.
        setting: configuration field that chose the key, named in the error.
        origin: place of the row, named in the error.

    Raises:
        DataError: if the key is missing or its value is not text that UTF-8 can hold.
    """
    if not isinstance(row, dict) or field not in row:
        held = f"has the fields {sorted(map(str, row))}" if isinstance(row, dict) else f"is a {type(row).__name__}"
        raise DataError(f"{origin} has no field {field!r} (it {held}); set `{setting}` to a field that all rows have")
    if not isinstance(row[field], str):
        raise DataError(
            f"{origin}: field {field!r} holds {row[field]!r:.60}, not text; set `{setting}` to a text field"
        )
    try:
        row[field].encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{origin}: field {field!r} has half of a surrogate pair at character {error.start}, which is no text; "
            f"write the character as UTF-8, or remove it"
        ) from None
    return row[field]


def _parse(line: str, origin: str, source: JsonlSource) -> Document:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{origin} is not valid JSON ({error.msg}); write one complete object a line") from None
    text = text_value(row, source.text_field, "text_field", origin)
    if source.domain_field is None:
        return Document(text, source.domain, origin)
    return Document(text, text_value(row, source.domain_field, "domain_field", origin), origin)


def _split(file: TextIO, separator: str | None) -> Iterator[str]:
    """The file's text, cut at `separator`, holding no more than one document and one block in memory."""
    if separator is None:
        yield file.read()
        return
    rest = ""
    while block := file.read(_READ_CHARACTERS):
        *parts, rest = (rest + block).split(separator)
        yield from parts
    yield rest


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _not_utf8(path: Path, error: UnicodeDecodeError) -> DataError:
    byte = error.object[error.start]
    return DataError(
        f"{path} is not UTF-8 text (byte 0x{byte:02x}: {error.reason}); convert it "
        f"(`iconv -f latin1 -t utf-8`), or leave it out by giving a glob such as '*.txt'"
    )
