import json
from pathlib import Path

import pytest

from moesaic.data import JsonlSource, TextSource, read_documents, text_files
from moesaic.errors import DataError


def texts(*paths: object, separator: str | None = None) -> list[str]:
    source = TextSource(paths=tuple(str(path) for path in paths), separator=separator)
    return [document.text for document in read_documents([source])]


def test_files_folders_and_globs(tmp_path: Path):
    (tmp_path / "sub").mkdir()
    for name in ("b.txt", "a.txt", "sub/c.md", ".hidden"):
        (tmp_path / name).write_text(name)
    assert texts(tmp_path / "b.txt") == ["b.txt"]
    assert texts(tmp_path) == ["a.txt", "b.txt", "sub/c.md"]
    assert texts(tmp_path / "**/*.md") == ["sub/c.md"]
    assert texts(tmp_path / "b.txt", tmp_path / "*.txt") == ["b.txt", "a.txt"], "a file named twice is read once"


@pytest.mark.parametrize("block", [1, 3, 1000])
def test_separator_cuts_a_file_whatever_the_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int):
    monkeypatch.setattr(text_files, "_READ_CHARACTERS", block)
    (tmp_path / "stories.txt").write_text("one<|end|>two\nlines<|end|>three<|end|>")
    assert texts(tmp_path / "stories.txt", separator="<|end|>") == ["one", "two\nlines", "three"]


def test_byte_order_mark_is_no_text(tmp_path: Path):
    (tmp_path / "bom.txt").write_text("text", encoding="utf-8-sig")
    assert texts(tmp_path / "bom.txt") == ["text"]


def test_missing_path_is_named(tmp_path: Path):
    with pytest.raises(DataError, match=r"no file at .*nothing.*give a file"):
        texts(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no file at .*empty"):
        texts(tmp_path / "empty")


@pytest.mark.parametrize("source", [TextSource, JsonlSource])
def test_a_file_that_is_not_utf8_is_named_with_a_remedy(tmp_path: Path, source: type):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 \n")
    with pytest.raises(DataError, match=r"latin\.txt is not UTF-8 text \(byte 0xe9.*iconv"):
        list(read_documents([source(paths=(str(tmp_path),))]))


def test_jsonl_takes_text_and_domain_from_fields(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"body": "x", "kind": "k"}\n\n{"body": "y", "kind": "l"}\n')
    source = JsonlSource(paths=(str(path),), text_field="body", domain_field="kind")
    assert [document[:3] for document in read_documents([source])] == [
        ("x", "k", f"{path}:1"),
        ("y", "l", f"{path}:3"),
    ]
    source = JsonlSource(paths=(str(path),), text_field="body", domain="web", max_documents=1)
    assert [document.domain for document in read_documents([source])] == ["web"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": ', "not valid JSON"),
        ('{"body": "x"}', r"no field 'text' \(it has the fields \['body'\]\); set `text_field`"),
        ('["x"]', "is a list"),
        ('{"text": 5}', "holds 5, not text"),
        ('{"text": "\\ud800"}', "half of a surrogate pair"),
    ],
)
def test_a_bad_jsonl_line_is_named(tmp_path: Path, line: str, message: str):
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps({"text": "good"}) + "\n" + line + "\n")
    with pytest.raises(DataError, match=rf"bad\.jsonl:2\b.*{message}"):
        list(read_documents([JsonlSource(paths=(str(path),))]))
