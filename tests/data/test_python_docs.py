from pathlib import Path

import pytest

from moesaic.data.python_docs import read_chat, read_documentation, read_numbers
from moesaic.data.split import is_validation
from moesaic.errors import DataError

SOURCE = '''"""Of the module."""

class Shape:
    """A shape.

    It has an area.
    """

    def area(self):
        """Its area."""

    def silent(self):
        return 0

async def fetch():
    """Bring it."""
'''


@pytest.fixture
def library(tmp_path: Path) -> Path:
    (tmp_path / "shapes.py").write_text(SOURCE)
    (tmp_path / "template.py").write_text("def {name}():\n")  # not Python: no docstrings
    return tmp_path


def test_documentation_is_topics_and_docstrings(library: Path):
    documents = list(read_documentation(library))
    by_origin = {document.origin: document for document in documents}
    assert "try" in by_origin["pydoc_data.topics:exceptions"].text
    assert by_origin["shapes.py"].text == "Of the module.\n\nA shape.\n\nIt has an area.\n\nIts area.\n\nBring it."
    assert by_origin["template.py"].text == ""
    assert {document.domain for document in documents} == {"documentation"}


def test_chat_asks_for_what_has_a_docstring(library: Path):
    documents = list(read_chat(library))
    assert [document.origin for document in documents] == ["shapes.py:Shape", "shapes.py:Shape.area", "shapes.py:fetch"]
    assert documents[1].text == "### User: What does `Shape.area` do?\n### Assistant: Its area.\n"
    assert {document.domain for document in documents} == {"chat"}


def test_all_that_comes_from_a_file_is_on_one_side(library: Path):
    made = [*read_chat(library), *(found for found in read_documentation(library) if found.origin == "shapes.py")]
    assert {document.split_by for document in made} == {SOURCE}
    for fraction in (0.2, 0.5, 0.8):
        assert len({is_validation(document, fraction) for document in made}) == 1


def test_numbers_are_tables_without_comments(tmp_path: Path):
    (tmp_path / "test" / "decimaltestdata").mkdir(parents=True)
    (tmp_path / "test" / "mathdata").mkdir()
    lines = [f"addx{n:03} add {n} 1 -> {n + 1}" for n in range(100)]
    (tmp_path / "test" / "decimaltestdata" / "add.decTest").write_text("-- a comment\n\n" + "\n".join(lines))
    (tmp_path / "test" / "mathdata" / "cmath_testcases.txt").write_text(
        "# a comment\nacos0000 acos 0.0 0.0 -> 1.5 -0.0\n"
    )
    documents = list(read_numbers(tmp_path))
    assert {document.origin for document in documents} == {"add.decTest:0", "add.decTest:64", "cmath_testcases.txt:0"}
    found = [line for document in documents for line in document.text.splitlines()]
    assert sorted(found) == sorted([*lines, "acos0000 acos 0.0 0.0 -> 1.5 -0.0"])
    assert documents == list(read_numbers(tmp_path))


def test_a_python_without_its_tests_is_an_error(tmp_path: Path):
    with pytest.raises(DataError, match=r"packaged without its tests.*use `tables`"):
        next(read_numbers(tmp_path))
