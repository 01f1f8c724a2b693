"""The files of a reproduction: a Markdown page, a table as CSV and JSON, and a plot; and the index of all pages."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moesaic.errors import DataError
from moesaic.files import write_text
from moesaic.papers.machine import describe_machine
from moesaic.papers.page import command_of, render_index, render_page
from moesaic.papers.plot import draw, draw_section
from moesaic.papers.registry import EXPERIMENTS
from moesaic.papers.reproduce import Reproduction
from moesaic.papers.result import ArmResult


def write_page(found: Reproduction, folder: str | Path) -> Path:
    """Write NAME.md, NAME.csv, NAME.json and, with matplotlib, NAME.svg and figures of sections into `folder`.

    Args:
        found: a finished reproduction.
        folder: made if missing.

    Returns:
        The page. Without matplotlib it says that there is no plot, and why.

    Raises:
        DataError: if the reproduction is not finished.
    """
    if not found.finished:
        raise DataError(f"{found.experiment.name} is not finished; a page needs every arm with every seed")
    folder, name = Path(folder), found.experiment.name
    size_of = "" if found.size == "cpu" else f"-{found.size}"
    plotted = draw(found, folder / f"{name}{size_of}.svg")
    for section in found.experiment.sections:
        draw_section(section, found, folder / f"{name}{size_of}-{section.stem}.svg")
    machine = describe_machine()
    write_text(folder / f"{name}{size_of}.csv", _table(found))
    write_text(folder / f"{name}{size_of}.json", _indented(content(found, machine)))
    page = folder / f"{name}{size_of}.md"
    write_text(page, render_page(found, machine, plotted=plotted, stem=page.stem))
    return page


def write_docs(found: Reproduction, folder: str | Path) -> Path:
    """`write_page` into the folder of the documentation, and its `index.md` anew.

    Returns:
        The page.
    """
    page = write_page(found, folder)
    write_text(Path(folder) / "index.md", index_of(folder))
    return page


def index_of(folder: str | Path) -> str:
    """The index of the reproductions whose JSON files are in `folder`; the others stand in it as not run."""
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in EXPERIMENTS}
    for path in sorted(Path(folder).glob("*.json")):
        results.setdefault(path.stem.partition("-")[0], []).append(
            {**json.loads(path.read_text(encoding="utf-8")), "page": f"{path.stem}.md"}
        )
    return render_index(EXPERIMENTS, results)


def content(found: Reproduction, machine: str) -> dict[str, Any]:
    """The whole result as plain data."""
    return _json_able(
        {
            "name": found.experiment.name,
            "size": found.size,
            "seeds": list(found.seeds),
            "overrides": list(found.overrides),
            "command": command_of(found),
            "machine": machine,
            "arms": {
                str(seed): {arm: _result(result, lists=arm == found.experiment.control) for arm, result in arms.items()}
                for seed, arms in sorted(found.results.items())
            },
            "claims": [
                {
                    "claim": judgement.claim.name,
                    "success": judgement.claim.success,
                    "source": judgement.claim.source,
                    "verdict": judgement.verdict,
                    "values": list(judgement.values),
                    "mean": judgement.mean,
                }
                for judgement in found.judgements()
            ],
        }
    )


def _result(result: ArmResult, *, lists: bool) -> dict[str, Any]:
    """Without what stands elsewhere; `lists` keeps the lists of numbers behind sections."""
    left_out = {"arm", "seed", "run"} | (set() if lists and result.series else {"series"})
    return {name: value for name, value in asdict(result).items() if name not in left_out}


def _indented(value: Any) -> str:
    """JSON for people: indented, but lists of numbers on one line."""
    text = json.dumps(value, indent=1)
    return re.sub(r"\[[^][{}\"]*\]", lambda numbers: " ".join(numbers.group().split()), text) + "\n"


def _json_able(value: Any) -> Any:
    """`value` with None for numbers that JSON lacks."""
    if isinstance(value, dict):
        return {key: _json_able(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json_able(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _table(found: Reproduction) -> str:
    """A row for each arm and seed, a column for each measurement."""
    results = [found.results[seed][arm] for seed in found.seeds for arm in found.arms]
    names = list(dict.fromkeys(name for result in results for name in result.measurements))
    fixed = ("arm", "seed", "tokens", "seconds", "parameters", "active_parameters")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*fixed, *names])
    for result in results:
        own = [getattr(result, name) for name in fixed]
        writer.writerow([*own, *(result.measurements.get(name, "") for name in names)])
    return text.getvalue()
