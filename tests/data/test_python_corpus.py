import itertools
from pathlib import Path

import pytest

from moesaic.data.python_corpus import read_code, read_prose, read_tables
from moesaic.errors import DataError


def test_prose_is_the_language_reference():
    topics = {document.origin: document.text for document in read_prose()}
    assert "try" in topics["pydoc_data.topics:exceptions"]
    assert list(topics) == sorted(topics)


def test_code_is_the_library_without_tests():
    names = [document.origin for document in read_code()]
    assert {"ast.py", "json/decoder.py", "asyncio/tasks.py"} <= set(names)
    folders = {part for name in names for part in Path(name).parts[:-1]}
    assert not folders & {"test", "tests", "site-packages", "pydoc_data"}


def test_a_short_prefix_is_a_sample_of_the_whole_library():
    first = [document.origin for document in itertools.islice(read_code(), 30)]
    assert first != sorted(first)
    assert len({name[0] for name in first}) > 8


def test_order_depends_on_names_alone(tmp_path: Path):
    orders = []
    for number, names in enumerate((["a", "b", "c", "d"], ["d", "c", "b", "a"])):
        root = tmp_path / str(number)
        root.mkdir()
        for name in names:
            (root / f"{name}.py").write_text("x = 1\n")
        orders.append([document.origin for document in read_code(root)])
    assert orders[0] == orders[1]


def test_a_coding_line_is_honoured(tmp_path: Path):
    (tmp_path / "old.py").write_bytes("# -*- coding: latin-1 -*-\nname = 'café'\n".encode("latin-1"))
    assert "café" in next(read_code(tmp_path)).text


def test_tables_hold_the_characters_of_this_python():
    documents = list(read_tables())
    lines = [line for document in documents for line in document.text.splitlines()]
    assert "00E9;LATIN SMALL LETTER E WITH ACUTE;Ll;0;L;0065 0301;" in lines
    assert "00BD;VULGAR FRACTION ONE HALF;No;0;ON;<fraction> 0031 2044 0032;0.5" in lines
    assert not any(line.split(";")[1].startswith("CJK") for line in lines)
    assert {len(line.split(";")) for line in lines} == {7}
    assert [document.origin for document in documents] == [document.origin for document in read_tables()]
    assert {document.domain for document in documents} == {"tables"}


def test_no_library_is_an_error(tmp_path: Path):
    with pytest.raises(DataError, match="holds no Python sources"):
        next(read_code(tmp_path))
