import itertools
from pathlib import Path

import pytest

from moesaic.data.python_corpus import read_code, read_prose
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


def test_no_library_is_an_error(tmp_path: Path):
    with pytest.raises(DataError, match="holds no Python sources"):
        next(read_code(tmp_path))
