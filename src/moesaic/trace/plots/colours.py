"""Colours that stay apart for colour-blind readers and, within a scale, in grey."""

from __future__ import annotations

import numpy as np

# ColorBrewer "Blues": from almost white to dark blue.
SEQUENTIAL = ("#f7fbff", "#deebf7", "#c6dbef", "#9ecae1", "#6baed6", "#4292c6", "#2171b5", "#08519c", "#08306b")
# Blue below, orange above, neutral in the middle: the pair that all common kinds of colour blindness tell apart.
DIVERGING = ("#143d73", "#3a70b2", "#86b0d8", "#c9dcec", "#f5f4f0", "#f9d9b0", "#eea556", "#c46a14", "#7a3b04")
# Okabe and Ito's palette, its yellow left out and two colours darkened, so that lines of each stand out on white.
CATEGORIES = ("#0072b2", "#c75000", "#00805f", "#a8457f", "#3aa0d8", "#b07a00", "#4b4b4b", "#7b5ea7")
DASHES = ("", "7 3", "2 3", "9 3 2 3", "", "7 3", "2 3", "9 3 2 3")
NOT_USED = "#1b2330"
EMPTY = "#e3e7ec"
LEVELS = 65


def ramp(anchors: tuple[str, ...], levels: int = LEVELS) -> np.ndarray:
    """Colours interpolated evenly between anchors, uint8 (levels, 3)."""
    rgb = np.array([[int(anchor[at : at + 2], 16) for at in (1, 3, 5)] for anchor in anchors], dtype=float)
    places = np.linspace(0, len(anchors) - 1, levels)
    mixed = np.stack([np.interp(places, np.arange(len(anchors)), rgb[:, channel]) for channel in range(3)], axis=1)
    return np.rint(mixed).astype(np.uint8)


def hexadecimal(colour: np.ndarray) -> str:
    """One colour of a ramp as "#rrggbb"."""
    return "#" + "".join(f"{channel:02x}" for channel in colour.tolist())
