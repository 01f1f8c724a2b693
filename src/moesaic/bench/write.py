"""Files of results for people: page, numbers and plot."""

from __future__ import annotations

import json
from pathlib import Path

from moesaic.bench.page import Files, render
from moesaic.bench.plot import draw
from moesaic.bench.store import Saved, read
from moesaic.files import write_text

STEM = "kernels"


def write_page(source: Path, folder: Path, *, stem: str = STEM) -> Path:
    """Write STEM.md, STEM.json and, with matplotlib, STEM.svg and STEM.png into `folder`.

    Args:
        source: a file of results.
        folder: made if missing.
        stem: name of the files.

    Returns:
        The page.
    """
    content = source.read_text(encoding="utf-8")
    saved: Saved = read(source)
    numbers = folder / f"{stem}.json"
    if numbers.resolve() != source.resolve():
        # Smaller than what it was read from, since samples are nanoseconds at best.
        write_text(numbers, json.dumps(_rounded(json.loads(content)), indent=1) + "\n")
    plot = folder / f"{stem}.svg"
    plotted = draw(list(saved.results.values()), plot)
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
