"""Task files: what they may hold, and errors that name file, line and field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moesaic.errors import DataError
from moesaic.infer.tasks import ChoiceItem, GenerateItem, load_task

CHOICE = {"prompt": "the sky is", "choices": [" red", " blue"], "answer": 1}
SUM = {"prompt": "1+1=", "answer": "2", "preset": "last_number"}


def write(folder: Path, *rows: Any) -> Path:
    path = folder / "sums.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return path


def test_both_kinds_with_defaults(tmp_path: Path) -> None:
    defaults = {"preset": "after_marker", "stop": ["\n\n"], "max_new_tokens": 9, "length": "bytes"}
    rows = [
        CHOICE,
        {"prompt": "q", "answer": 4},
        {**SUM, "id": 7},
        "",
        {"prompt": "q", "answer": "x", "pattern": "(x)"},
    ]
    task = load_task(write(tmp_path, {"defaults": defaults}, *rows))
    assert task.name == "sums"
    choice, marked, own, pattern = task.items.values()
    assert list(task.items) == ["0", "1", "7", "3"]
    assert isinstance(choice, ChoiceItem)
    assert (choice.length, choice.right) == ("bytes", 1)
    assert isinstance(marked, GenerateItem)
    assert (marked.stop, marked.max_new_tokens, marked.right) == (("\n\n",), 9, {"4"})
    assert marked.extractor("so #### 4.0") == "4"
    assert isinstance(own, GenerateItem)
    assert own.preset == "last_number"
    assert isinstance(pattern, GenerateItem)
    assert (pattern.pattern, pattern.preset) == ("(x)", None)


@pytest.mark.parametrize("answer", [1, "B", " blue", "blue"])
def test_the_right_choice_by_number_letter_or_text(answer: int | str) -> None:
    assert ChoiceItem.from_dict({**CHOICE, "answer": answer}).right == 1


def test_several_right_answers() -> None:
    item = GenerateItem.from_dict({**SUM, "answer": ["1,000", 7]})
    assert item.right == {"1000", "7"}


def test_a_fingerprint_follows_the_content() -> None:
    item = GenerateItem.from_dict(SUM)
    assert GenerateItem.from_dict({**SUM, "id": "other"}).fingerprint == item.fingerprint
    assert GenerateItem.from_dict({**SUM, "answer": "3"}).fingerprint != item.fingerprint


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", r"line 2, column 2: is not JSON"),
        ("[1]", "line 2: is not a JSON object"),
        ({"prompt": "x", "preset": "last_number"}, "line 2: answer = None is required"),
        ({**SUM, "presett": 1}, "line 2: presett = 1 is not a known key; did you mean 'preset'"),
        ({**SUM, "preset": "best"}, "line 2: preset = 'best' is not one of the choices"),
        ({**SUM, "pattern": "(x)"}, "line 2: pattern = .* both given"),
        ({"prompt": "x", "answer": "x"}, "line 2: pattern = None is missing"),
        ({"prompt": "x", "answer": "x", "pattern": "x"}, "line 2: pattern = 'x' has no group"),
        ({**SUM, "answer": "two"}, "line 2: answer = 'two' can't be compared as number"),
        ({**SUM, "answer": []}, "line 2: answer = .* is empty"),
        ({**SUM, "stop": [""]}, r"line 2: stop\.0 = '' is empty"),
        ({**SUM, "max_new_tokens": 0}, "line 2: max_new_tokens = 0"),
        ({**SUM, "type": "essay"}, "line 2: type = 'essay' is not one of the choices"),
        ({**CHOICE, "answer": 2}, "line 2: answer = 2 is none of the choices; give 0 to 1, A to B"),
        ({**CHOICE, "choices": [" red"]}, "line 2: choices = "),
        ({**CHOICE, "choices": [" red", " red"]}, r"line 2: choices\.1 = ' red' stands there twice"),
        ({**CHOICE, "choices": [" red", ""]}, r"line 2: choices\.1 = '' is empty"),
        ({**CHOICE, "id": "0"}, "line 2: id = '0' is there twice"),
    ],
)
def test_errors_name_file_line_and_field(tmp_path: Path, row: Any, message: str) -> None:
    with pytest.raises(DataError, match=rf"sums\.jsonl, {message}"):
        load_task(write(tmp_path, CHOICE, row))


def test_errors_of_the_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a file"):
        load_task(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="holds no items"):
        load_task(write(tmp_path, ""))
    with pytest.raises(DataError, match=r"defaults\.prompt is not a known default"):
        load_task(write(tmp_path, {"defaults": {"prompt": "x"}}, SUM))
    (tmp_path / "sums.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="UTF-8"):
        load_task(tmp_path / "sums.jsonl")
