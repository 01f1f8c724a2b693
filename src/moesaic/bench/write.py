"""Files of results for people: page, numbers and plot."""

from __future__ import annotations

import json
from pathlib import Path

from moesaic.bench.page import Files, render
from moesaic.bench.plot import draw
from moesaic.bench.store import read
from moesaic.files import write_text

STEM = "kernels"


def write_page(source: Path, folder: Path, *, stem: str = STEM, png: bool = True) -> Path:
    """Write STEM.md, STEM.json and, with matplotlib, STEM.svg (and STEM.png) into `folder`.

    Args:
        source: a file of results.
        folder: made if missing.
        stem: name of the files.
        png: whether the plot is also wanted as PNG.

    Returns:
        The page.
    """
    saved = read(source)
    numbers = folder / f"{stem}.json"
    write_text(numbers, json.dumps(_rounded(saved.to_dict()), separators=(",", ":")) + "\n")
    plot = folder / f"{stem}.svg"
    plotted = draw(list(saved.results.values()), plot, png=png)
    page = folder / f"{stem}.md"
    write_text(page, render(saved, Files(numbers.name, plot.name if plotted else None)))
    return page


def _rounded(value: object) -> object:
    """Numbers with six digits."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value
