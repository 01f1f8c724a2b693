"""Token files: the documents of one split, one after another, read through memory maps.

A folder holds `tokens.bin` (uint16 or uint32; every document ends with EOS), `starts.bin` (int64; where each document
starts, then the total) and `domains.bin` (int32; index of each document's domain).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from moesaic.errors import DataError


def token_dtype(vocabulary_limit: int) -> np.dtype:
    """The smallest of uint16 and uint32 that holds all ids below `vocabulary_limit`."""
    return np.dtype(np.uint16 if vocabulary_limit <= 2**16 else np.uint32)


class TokenWriter:
    """Append documents to the token files of a new folder; memory use does not grow with their number.

    Args:
        folder: made by the writer.
        dtype: type of token ids.
    """

    def __init__(self, folder: Path, dtype: np.dtype) -> None:
        folder.mkdir(parents=True)
        self._dtype = dtype
        self._tokens = (folder / "tokens.bin").open("wb")
        self._starts = (folder / "starts.bin").open("wb")
        self._domains = (folder / "domains.bin").open("wb")
        self._position = 0

    def append(self, token_ids: Sequence[int], domain: int) -> None:
        """Add one document, EOS included.

        Raises:
            OverflowError: if an id does not fit the dtype.
        """
        self._tokens.write(np.asarray(token_ids, dtype=self._dtype).tobytes())
        self._starts.write(np.int64(self._position).tobytes())
        self._domains.write(np.int32(domain).tobytes())
        self._position += len(token_ids)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._starts.write(np.int64(self._position).tobytes())
        for file in (self._tokens, self._starts, self._domains):
            file.close()


class TokenStore:
    """Read the files of a `TokenWriter`.

    Attributes:
        tokens: all ids.
        starts: first token of each document, then the number of tokens; length documents + 1.
        domains: index of each document's domain.

    Raises:
        DataError: if the files are missing or their sizes do not agree.
    """

    def __init__(self, folder: Path, dtype: np.dtype) -> None:
        self.tokens = _map(folder / "tokens.bin", dtype)
        self.starts = _map(folder / "starts.bin", np.dtype(np.int64))
        self.domains = _map(folder / "domains.bin", np.dtype(np.int32))
        if len(self.starts) != len(self.domains) + 1 or self.starts[-1] != len(self.tokens):
            raise DataError(
                f"the token files in {folder} are damaged (sizes do not agree); delete {folder.parent} to tokenise again"
            )

    def documents_of(self, domain: int) -> np.ndarray:
        """Indices of the documents of a domain, in order."""
        return np.flatnonzero(self.domains == domain)


def _map(path: Path, dtype: np.dtype) -> np.ndarray:
    if not path.is_file():
        raise DataError(f"{path} is missing; delete {path.parent.parent} to tokenise again")
    size = path.stat().st_size
    if size % dtype.itemsize:
        raise DataError(f"{path} is damaged (cut short at byte {size}); delete {path.parent.parent} to tokenise again")
    if size == 0:  # an empty file cannot be mapped
        return np.empty(0, dtype)
    return np.memmap(path, dtype, mode="r")
