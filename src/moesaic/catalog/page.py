"""The parts of docs/catalog.md that follow from the data.

`python -m moesaic.catalog.page docs/catalog.md` writes them anew, between markers in the page; tests ask for that.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from pathlib import Path

from moesaic.catalog.counting import CannotCount
from moesaic.catalog.load import models
from moesaic.catalog.schema import ModelRecord, ParameterCount
from moesaic.catalog.taxonomy import DECISIONS, Mechanism, branches, losses, mechanisms
from moesaic.errors import ConfigError
from moesaic.files import write_text


def filled(page: str) -> str:
    """The page with its generated parts as the data has them now.

    Raises:
        ConfigError: if a marker is missing.
    """
    parts = {"counts": _counts(), "tree": _tree(), "losses": _losses(), "models": _models()}
    for name, text in parts.items():
        begin, end = f"<!-- {name}: generated -->", f"<!-- {name}: end -->"
        pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        if pattern.search(page) is None:
            raise ConfigError("page", name, "has no markers in it", f"write {begin} and {end} where it belongs")
        replacement = f"{begin}\n\n{text}\n\n{end}"
        page = pattern.sub(lambda _, text=replacement: text, page)
    return page


def _counts() -> str:
    counts = Counter(entry.decision for entry in mechanisms())
    rows = [f"| {name.replace('_', ' ')} | {DECISIONS[name]} | {counts[name]} |" for name in DECISIONS]
    return "\n".join(["| | | mechanisms |", "|---|---|---|", *rows, f"| together | | {sum(counts.values())} |"])


def _tree() -> str:
    """Branches and their mechanisms as a nested list."""
    entries, lines = mechanisms(), []
    for path, title in branches().items():
        depth = path.count("/")
        lines.append(f"{'    ' * depth}- **{path.rsplit('/', 1)[-1]}**: {title.lower() if depth else title}")
        lines += [f"{'    ' * (depth + 1)}- {_leaf(entry)}" for entry in entries if entry.path == path]
        also = [entry.title for entry in entries if path in entry.also]
        if also:
            lines.append(f"{'    ' * (depth + 1)}- from other branches: {', '.join(also)}")
    return "\n".join(lines)


def _leaf(entry: Mechanism) -> str:
    source = f"[{entry.title}]({entry.link})" if entry.link else f"{entry.title} ({entry.reference})"
    mark = ", number not verified" if entry.unverified else ""
    where = f" [{entry.page.removesuffix('.md')}]({entry.page})" if entry.page else ""
    reason = f": {entry.reason}" if entry.reason else ""
    return f"`{entry.name}` {source}, {entry.year}{mark}: {entry.line}. *{entry.decision.replace('_', ' ')}*{where}{reason}"


def _losses() -> str:
    rows = [
        f"| {loss.number} | `{loss.name}` | {loss.formula} | {loss.balanced} | {loss.weight} | {_have(loss.decision, loss.reason)} |"
        for loss in losses()
    ]
    return "\n".join(["| | name | formula | balanced | coefficients | moesaic |", "|---|---|---|---|---|---|", *rows])


def _have(decision: str, reason: str | None) -> str:
    return decision.replace("_", " ") + (f": {reason}" if reason else "")


def _models() -> str:
    head = ["| name | model | year | total | active | experts | router | built |", "|---|---|---|---|---|---|---|---|"]
    return "\n".join([*head, *map(_model, models())])


def _model(record: ModelRecord) -> str:
    published = record.published
    try:
        size = record.size()
    except CannotCount:
        total = _printed(None if published is None else published.total)
        active = _printed(None if published is None else published.active)
    else:
        total, active = _billions(size.total), _billions(size.active)
    title = record.title if record.arxiv is None else f"[{record.title}](https://arxiv.org/abs/{record.arxiv})"
    cells = (f"`{record.name}`", title, record.year, total, active, record.picks, record.router.kind, record.built)
    return f"| {' | '.join(map(str, cells))} |"


def _billions(number: float) -> str:
    return f"{number / 1e9:.3g} B" if number >= 1e7 else f"{number / 1e6:.3g} M"


def _printed(count: ParameterCount | None) -> str:
    return "-" if count is None else f"({count.billions:g} B)"


if __name__ == "__main__":
    target = Path(sys.argv[1])
    write_text(target, filled(target.read_text(encoding="utf-8")))
