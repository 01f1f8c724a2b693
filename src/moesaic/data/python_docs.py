"""Text made of what comes with Python: its documentation, questions that docstrings answer, and tables of numbers."""

from __future__ import annotations

import ast
import hashlib
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from moesaic.data.documents import Document
from moesaic.data.python_corpus import read_code, read_prose
from moesaic.errors import DataError

_LINES = 64  # of a document of numbers


def read_documentation(root: Path | None = None) -> Iterator[Document]:
    """The documentation topics, then the docstrings of the standard library, those of a file as one document.

    A file's docstrings are on the same side of the split as its code and its questions.

    Args:
        root: folder of the standard library; None for the running Python's.

    Raises:
        DataError: if there are no topics or no sources.
    """
    for topic in read_prose():
        yield topic._replace(domain="documentation")
    for source in read_code(root):
        text = "\n\n".join(docstring for _, docstring in _docstrings(source.text))
        yield Document(text, "documentation", source.origin, split_by=source.text)


def read_chat(root: Path | None = None) -> Iterator[Document]:
    """A question for each class and function of the standard library, its docstring as the answer.

    Args:
        root: folder of the standard library; None for the running Python's.

    Raises:
        DataError: if there are no sources.
    """
    for source in read_code(root):
        for name, docstring in _docstrings(source.text):
            if name:
                text = f"### User: What does `{name}` do?\n### Assistant: {docstring}\n"
                yield Document(text, "chat", f"{source.origin}:{name}", split_by=source.text)


def read_numbers(root: Path | None = None) -> Iterator[Document]:
    """The tables that Python's tests of `decimal`, `math` and `cmath` compare with, without comments.

    A document has 64 lines; documents come in an order that looks random but is the same everywhere.

    Args:
        root: folder of the standard library; None for the running Python's.

    Raises:
        DataError: if this Python was packaged without its tests.
    """
    root = Path(sysconfig.get_path("stdlib")) if root is None else root
    tests = root / "test"
    # Since Python 3.13 the tables of math and cmath have a folder of their own.
    files = [*tests.glob("*math_testcases.txt"), *tests.glob("mathdata/*math_testcases.txt")]
    files += tests.glob("decimaltestdata/*.decTest")
    if not files:
        raise DataError(
            f"{tests} holds no tables of numbers: this Python was packaged without its tests; install them "
            "(Debian: apt install libpython3-testsuite), or use `tables` in place of `numbers` in `domains`"
        )
    blocks = []
    for path in files:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        lines = [line for line in lines if line.strip() and not line.startswith(("--", "#"))]
        blocks += [(path.name, start, lines[start : start + _LINES]) for start in range(0, len(lines), _LINES)]
    for name, start, lines in sorted(blocks, key=lambda block: hashlib.sha256(f"{block[:2]}".encode()).digest()):
        yield Document("\n".join(lines) + "\n", "numbers", f"{name}:{start}")


def _docstrings(text: str) -> Iterator[tuple[str, str]]:
    """Qualified names of a module ("", for itself), its classes and functions with their docstrings, in order."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of old sources: invalid escapes
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError):  # templates, and samples of what can't be parsed
            return
    yield from _of_node(tree, "")


def _of_node(
    node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, name: str
) -> Iterator[tuple[str, str]]:
    docstring = ast.get_docstring(node)
    if docstring:
        yield name, docstring
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _of_node(child, f"{name}.{child.name}" if name else child.name)
