"""Text that is found wherever Python is: its documentation topics, its library's sources, and a table of characters."""

from __future__ import annotations

import hashlib
import importlib
import os
import sysconfig
import tokenize
import unicodedata
from collections.abc import Iterator
from pathlib import Path

from moesaic.data.documents import Document
from moesaic.errors import DataError

_BLOCK = 128
# Their names are made by a rule from the code point: tens of thousands of lines that say nothing.
_NAMED_BY_RULE = (
    "CJK ",
    "HANGUL SYLLABLE",
    "TANGUT ",
    "NUSHU ",
    "KHITAN ",
    "VARIATION SELECTOR",
    "EGYPTIAN HIEROGLYPH",
)

# Tests, installed packages, generated tables of characters, and the documentation that is already the prose domain.
_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "pydoc_data"}


def read_prose() -> Iterator[Document]:
    """The language reference as `help()` shows it, by topic name.

    Raises:
        DataError: if this Python was packaged without its documentation topics.
    """
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        raise DataError(
            "this Python has no documentation topics (module pydoc_data.topics); install the full standard library "
            "(Debian: apt install libpython3-stdlib) or set `domains: [code]`"
        ) from None
    for name in sorted(topics):
        yield Document(topics[name], "prose", f"pydoc_data.topics:{name}")


def read_code(root: Path | None = None) -> Iterator[Document]:
    """Sources of the standard library, in an order that looks random but is the same everywhere.

    Args:
        root: folder of the standard library; None for the running Python's.

    Raises:
        DataError: if there are no sources (a frozen or zipped Python).
    """
    root = Path(sysconfig.get_path("stdlib")) if root is None else root
    names = list(_library_sources(root))
    if not names:
        raise DataError(
            f"{root} holds no Python sources; use a Python installed with its library, or set `domains: [prose]`"
        )
    # By hash of the name: a size cap then takes a fair sample, where alphabetical order would take asyncio and little
    # else.
    for name in sorted(names, key=lambda name: hashlib.sha256(name.as_posix().encode()).digest()):
        with tokenize.open(root / name) as file:  # honours the coding line
            yield Document(file.read(), "code", name.as_posix())


def read_tables() -> Iterator[Document]:
    """The Unicode character table of this Python as semicolon-separated lines, a document for 128 code points.

    Fields as in UnicodeData.txt: code point, name, category, combining class, direction, decomposition, number. Documents
    come in an order that looks random but is the same everywhere.
    """
    blocks = range(0, 0x110000, _BLOCK)
    for start in sorted(blocks, key=lambda block: hashlib.sha256(str(block).encode()).digest()):
        lines = [line for point in range(start, start + _BLOCK) if (line := _character(chr(point)))]
        if lines:
            yield Document("\n".join(lines) + "\n", "tables", f"unicodedata:{start:04X}")


def _character(character: str) -> str:
    """The line of one character; empty if it has no name of its own."""
    name = unicodedata.name(character, "")
    if not name or name.startswith(_NAMED_BY_RULE):
        return ""
    number = unicodedata.numeric(character, None)
    fields = (
        f"{ord(character):04X}",
        name,
        unicodedata.category(character),
        unicodedata.combining(character),
        unicodedata.bidirectional(character),
        unicodedata.decomposition(character),
        "" if number is None else f"{number:g}",
    )
    return ";".join(map(str, fields))


def _library_sources(root: Path) -> Iterator[Path]:
    """Names of the sources that every machine with this Python version has: no tests, packages, or build settings."""
    for folder, subfolders, files in os.walk(root):
        # Pruned here and not filtered later: installed packages may be a hundred times the library.
        subfolders[:] = [name for name in subfolders if name not in _SKIPPED_FOLDERS]
        for name in files:
            if name.endswith(".py") and not name.startswith("_sysconfigdata"):
                yield (Path(folder) / name).relative_to(root)
