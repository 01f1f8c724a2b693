import sys
from pathlib import Path

import pytest

from moesaic.data import DatasetsSource, Document, read_documents
from moesaic.errors import DataError


@pytest.fixture(autouse=True)
def _offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f'{{"text": "row {n}", "kind": "k{n % 2}"}}\n' for n in range(5)))
    return path


@pytest.mark.parametrize("streaming", [True, False])
def test_rows_of_local_files(rows: Path, streaming: bool):
    source = DatasetsSource(path="json", data_files=str(rows), streaming=streaming, domain_field="kind")
    assert list(read_documents([source])) == [
        Document(f"row {n}", f"k{n % 2}", f"dataset 'json' (train) row {n}") for n in range(5)
    ]


def test_several_files_and_splits(rows: Path):
    source = DatasetsSource(path="json", data_files={"held": (str(rows), str(rows))}, split="held", domain="web")
    documents = list(read_documents([source]))
    assert len(documents) == 10
    assert {document.domain for document in documents} == {"web"}


def test_streaming_reads_no_further_than_the_cap(tmp_path: Path):
    path = tmp_path / "endless.txt"
    # Rows after the first block are not valid UTF-8: reading the whole file would fail.
    path.write_bytes(b"".join(b"line %d\n" % n for n in range(2_000_000)) + b"\xff\xfe\n")
    source = DatasetsSource(path="text", data_files=str(path), max_documents=3)
    assert [document.text for document in read_documents([source])] == ["line 0", "line 1", "line 2"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split": "nothing"}, r"cannot open dataset 'json' .*split='nothing'"),
        ({"data_files": "nothing.jsonl"}, r"cannot open dataset 'json' .*nothing\.jsonl"),
        ({"text_field": "body"}, r"row 0 has no field 'body' \(it has the fields \['kind', 'text'\]\)"),
        ({"path": "no-such-owner/no-such-dataset", "data_files": None}, "cannot open dataset 'no-such-owner"),
    ],
)
def test_errors_name_the_dataset(rows: Path, changes: dict, message: str):
    source = DatasetsSource(**{"path": "json", "data_files": str(rows), **changes})
    with pytest.raises(DataError, match=message):
        list(read_documents([source]))


def test_a_row_that_does_not_parse_is_an_error(rows: Path):
    rows.write_text("not json\n")
    with pytest.raises(DataError, match=r"dataset 'json'"):
        list(read_documents([DatasetsSource(path="json", data_files=str(rows))]))


def test_missing_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install \"moesaic\[train\]\""):
        list(read_documents([DatasetsSource(path="json")]))
