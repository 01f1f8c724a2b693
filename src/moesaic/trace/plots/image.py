"""Cells as a picture with a palette: a byte a cell before compression, and one node in the page however many there are."""

from __future__ import annotations

import base64
import struct
import zlib

import numpy as np


def png(index_RC: np.ndarray, palette_C3: np.ndarray) -> bytes:
    """A PNG file (ISO/IEC 15948) of colour type 3: one pixel for each entry.

    Args:
        index_RC: number of the colour of each pixel, uint8.
        palette_C3: up to 256 colours, uint8.
    """
    height, width = index_RC.shape
    lines = np.zeros((height, width + 1), dtype=np.uint8)  # each line starts with its filter, 0 for none
    lines[:, 1:] = index_RC
    head = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)
    parts = [(b"IHDR", head), (b"PLTE", palette_C3.astype(np.uint8).tobytes())]
    parts += [(b"IDAT", zlib.compress(lines.tobytes(), 9)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, content) for kind, content in parts)


def data_uri(index_RC: np.ndarray, palette_C3: np.ndarray) -> str:
    """The same as an address that holds its own content."""
    return "data:image/png;base64," + base64.b64encode(png(index_RC, palette_C3)).decode()


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
