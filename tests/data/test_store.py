from pathlib import Path

import numpy as np
import pytest
from tests.data.builders import store_of

from moesaic.data.store import TokenStore, TokenWriter, token_dtype
from moesaic.errors import DataError


def test_documents_come_back():
    store = store_of([[1, 2, 3], [4], [5, 6]], [0, 1, 0])
    assert store.tokens.tolist() == [1, 2, 3, 4, 5, 6]
    assert store.starts.tolist() == [0, 3, 4, 6]
    assert store.documents_of(0).tolist() == [0, 2]


def test_empty_store():
    store = store_of([])
    assert (len(store.tokens), store.starts.tolist(), len(store.domains)) == (0, [0], 0)


def test_dtype_holds_the_vocabulary():
    assert token_dtype(2**16) == np.uint16
    assert token_dtype(2**16 + 1) == np.uint32


def test_an_id_that_does_not_fit_is_refused_not_wrapped(tmp_path: Path):
    with pytest.raises(OverflowError), TokenWriter(tmp_path / "split", np.dtype(np.uint16)) as writer:
        writer.append([70_000], 0)


@pytest.mark.parametrize("name", ["tokens.bin", "starts.bin", "domains.bin"])
@pytest.mark.parametrize("kept_bytes", [None, -1, 4])
def test_damaged_files_are_refused(tmp_path: Path, name: str, kept_bytes: int | None):
    folder = tmp_path / "entry" / "train"
    with TokenWriter(folder, np.dtype(np.uint16)) as writer:
        writer.append([1, 2, 3], 0)
        writer.append([4, 5], 0)
    file = folder / name
    if kept_bytes is None:
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:kept_bytes])
    with pytest.raises(DataError, match=r"(damaged|missing).*delete .*entry"):
        TokenStore(folder, np.dtype(np.uint16))
