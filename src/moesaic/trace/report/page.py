"""`write_report`: what the router did, as one HTML page that opens anywhere without a network."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from moesaic.files import write_text
from moesaic.trace.accounting import Accounting
from moesaic.trace.plots import save, svg
from moesaic.trace.report import (
    coactivation,
    compare,
    drops,
    explorer,
    load,
    nulls,
    overview,
    routers,
    saturation,
    specialisation,
    tokens,
)
from moesaic.trace.report.names import TokenNames
from moesaic.trace.report.parts import Figure, Section, Tile
from moesaic.trace.report.subject import Named, Subject
from moesaic.trace.router_statistics import RouterStatistics
from moesaic.trace.rows import RoutingLog


@dataclass(frozen=True)
class Report:
    """A report: its sections, to be written as a page, as numbers or as pictures.

    Attributes:
        subject: what it is about.
        tiles: numbers at its head.
        sections: in the order of the page.
        texts: what the token explorer shows.
    """

    subject: Subject
    tiles: Sequence[Tile]
    sections: Sequence[Section]
    texts: Mapping[str, Any] = field(repr=False)

    @property
    def figures(self) -> list[Figure]:
        """Figures of all sections."""
        return [figure for section in self.sections for figure in section.figures]

    def to_dict(self) -> dict[str, Any]:
        """All numbers as a plain JSON-able dict: what was traced, and every table by the name of its figure."""
        subject = self.subject
        return {
            "title": subject.title,
            "facts": dict(subject.facts),
            "header": subject.log.header.model_dump(mode="json"),
            "tokens": subject.num_tokens,
            "documents": subject.num_documents,
            "accounting": None if subject.accounting is None else subject.accounting.to_dict(),
            "routers": [asdict(row) for row in subject.statistics],
            "tables": {figure.name: figure.table.to_dict() for figure in self.figures},
        }

    def save_figures(self, folder: str | Path, formats: tuple[str, ...] = ("png", "svg")) -> list[Path]:
        """Write every plot as `folder/<name of the figure>.<format>`.

        Raises:
            ConfigError: if matplotlib is not installed.
            OSError: if a file can't be written.
        """
        return [
            path
            for figure in self.figures
            if figure.plot is not None
            for path in save(figure.plot, figure.label, folder, figure.name, formats)
        ]

    def to_html(self) -> str:
        """The page: everything in it, nothing loaded."""
        environment = _environment()
        return environment.get_template("page.html.j2").render(
            title=self.subject.title,
            facts=self.subject.facts,
            tiles=self.tiles,
            sections=self.sections,
            numbers=_embedded(self.to_dict()),
            texts=_embedded(self.texts),
            version=version("moesaic"),
        )


def make_report(
    log: RoutingLog,
    accounting: Accounting | None = None,
    *,
    title: str,
    tokenizer: Any = None,
    facts: Mapping[str, str] | None = None,
    statistics: Sequence[RouterStatistics] = (),
    checkpoints: Sequence[Named] = (),
    other: Named | None = None,
    top: int = 8,
    minimum: int = 5,
) -> Report:
    """Everything that a routing report says; see `write_report`, which writes it as a page.

    Raises:
        ConfigError: if the trace holds no tokens, or only counts.
        TraceError: if other traces do not fit it.
    """
    subject = Subject(
        log=log,
        title=title,
        names=TokenNames(tokenizer),
        accounting=accounting,
        facts=dict(facts or {}),
        statistics=statistics,
        checkpoints=checkpoints,
        other=other,
        top=top,
        minimum=minimum,
    )
    _ = subject.counts  # says what is wrong with the trace before anything else is done
    explored, texts = explorer.section(subject, _environment())
    found = [
        overview.section(subject),
        explored,
        load.load_section(subject),
        load.balance_section(subject),
        specialisation.section(subject),
        tokens.section(subject),
        coactivation.section(subject),
        saturation.section(subject),
        drops.section(subject),
        nulls.section(subject),
        compare.section(subject),
        routers.section(subject),
    ]
    return Report(subject, overview.tiles(subject), [section for section in found if section is not None], texts)


def write_report(path: str | Path, log: RoutingLog, accounting: Accounting | None = None, **options: Any) -> Path:
    """Write the routing report: one self-contained HTML file, in place of what was there only when complete.

    Args:
        path: file to write.
        log: a trace, recorded with `keep="tokens"` or read from files.
        accounting: of the model that was traced; None leaves size and cost out.
        **options: of `make_report`. `title` names the model. `tokenizer`, of transformers, makes token ids readable;
            without one, ids are shown. `facts` are further lines for the head of the page (text, checkpoint, command).
            `statistics`, from `router_statistics`, adds what each router says of itself. `checkpoints` are traces of
            earlier states of the model on the same text, and `other` is a trace of another model on it. `top` (8)
            tokens are listed for each expert, and a token counts as specific to an expert from `minimum` (5) picks on.

    Returns:
        The path.

    Raises:
        ConfigError: if the trace holds no tokens, or only counts.
        TraceError: if other traces do not fit it.
        OSError: if the file can't be written.
    """
    write_text(path, make_report(log, accounting, **options).to_html())
    return Path(path)


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("moesaic.trace.report", "template"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"svg": svg}
    environment.tests |= {"chips": lambda cell: isinstance(cell, list | tuple)}
    return environment


def _embedded(value: Any) -> Markup:
    """JSON that can stand in a script element: no text in it can end the element or begin a comment."""
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029"))
