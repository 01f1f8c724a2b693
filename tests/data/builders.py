"""Token files made by hand, so that a test knows every token."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from moesaic.data.store import TokenStore, TokenWriter


def store_of(documents: Sequence[Sequence[int]], domains: Sequence[int] | None = None) -> TokenStore:
    """A store of these documents; the memory maps stay valid after its folder is gone."""
    dtype = np.dtype(np.uint16)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "split"
        with TokenWriter(folder, dtype) as writer:
            for document, domain in zip(documents, domains or [0] * len(documents), strict=True):
                writer.append(document, domain)
        return TokenStore(folder, dtype)


def numbered_documents(lengths: Sequence[int]) -> list[list[int]]:
    """Documents of these lengths whose tokens are 0, 1, 2, ... over all of them."""
    ends = np.cumsum(lengths)
    return [list(range(end - length, end)) for end, length in zip(ends.tolist(), lengths, strict=True)]
