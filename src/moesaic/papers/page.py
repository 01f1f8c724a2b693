"""The Markdown page of a reproduction, and the index of all."""

from __future__ import annotations

import math
import statistics
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from moesaic.papers.claims import Judgement
from moesaic.papers.experiment import Experiment, Section
from moesaic.papers.reproduce import Reproduction
from moesaic.papers.result import ArmResult
from moesaic.papers.sizes import read_size
from moesaic.trace.accounting import short


def command_of(found: Reproduction) -> str:
    """The command that makes the same numbers."""
    words = [
        f"moesaic reproduce {found.experiment.name} --size {found.size}",
        f"--seeds {','.join(map(str, found.seeds))}",
    ]
    return " ".join([*words, *(f"--set {_quoted(override)}" for override in found.overrides)])


def render_page(found: Reproduction, machine: str, *, plotted: bool, stem: str) -> str:
    """The page of a finished reproduction.

    Args:
        found: what was measured.
        machine: on what, in a sentence.
        plotted: whether there is a plot beside the page.
        stem: name of the files beside the page, without suffix.
    """
    experiment = found.experiment
    plot = f"![Validation loss over tokens, and what the arms differ in]({stem}.svg)" if plotted else _NO_PLOT
    seconds = sum(result.seconds for arms in found.results.values() for result in arms.values())
    seeds = f"{len(found.seeds)} seed{'s' if len(found.seeds) > 1 else ''} ({', '.join(map(str, found.seeds))})"
    given = "checkpoint" in _first(found).run
    parts = [
        f"# {experiment.title}",
        f"{experiment.question} Reproduces {experiment.paper}.",
        f"Size `{found.size}`: {read_size(experiment, found.size)['about']}. {seeds}: "
        + (
            "each decides what is drawn. What is measured is "
            if given
            else "each decides initial weights and the order of the data, of all arms alike. "
            f"The control is `{experiment.control}`. The run is "
        )
        + f"`src/moesaic/papers/{experiment.name}.{found.size}.yaml`"
        + (", changed by the command below." if found.overrides else "."),
        f"<!-- no-run: trains for many minutes -->\n```bash\n{command_of(found)}\n```",
        "## Claims",
        _claims(found.judgements()),
        "An advantage is above zero where the claim is true; mean ± standard deviation over seeds, paired by seed. A claim "
        "*holds* or *does not hold* where a one-sided t-test over seeds says so at 5 %; otherwise this size and number of "
        "seeds do not resolve it.",
        "## Arms",
        *([_given(found)] if given else [_arms(found), _of_arms(found)]),
        _measurements(found),
        plot,
        *(part for section in experiment.sections for part in _section(section, found, plotted=plotted, stem=stem)),
        *(["## How to read it", "\n".join(f"- {note}" for note in experiment.notes)] if experiment.notes else []),
        ("" if given else f"All training steps together took {seconds / 60:.1f} minutes of one process. ")
        + f"Every number by seed is in [{stem}.csv]({stem}.csv), with curves in [{stem}.json]({stem}.json).",
        f"Measured on {machine}.",
    ]
    return "\n\n".join(_wrapped(part) for part in parts if part) + "\n"


def render_index(experiments: Mapping[str, Experiment], results: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """The index.

    Args:
        experiments: all there are.
        results: by name, the JSON content of each size that was run, and its `page`.
    """
    rows = []
    for name, experiment in experiments.items():
        for result in results.get(name) or [None]:
            if result is None:
                rows.append(f"| `{name}` | {experiment.question} | not run yet |")
                continue
            counts = Counter(claim["verdict"] for claim in result["claims"])
            verdicts = ", ".join(f"{counts[verdict]} {verdict}" for verdict in _VERDICTS if counts[verdict])
            rows.append(
                f"| [`{name}`]({result['page']}) | {experiment.question} | {verdicts} "
                f"(size `{result['size']}`, {len(result['seeds'])} seeds) |"
            )
    return _INDEX.format(rows="\n".join(rows))


_VERDICTS = ("holds", "does not hold", "not resolved")
_NO_PLOT = "There is no plot: matplotlib was missing (`pip install 'moesaic[plots]'`)."
_INDEX = """# Reproductions

For each paper an experiment at a stated size, its control arm, and what counts as success. One command trains every arm
with every seed, measures the models and judges the claims; claims that do not show at this size stay on the page.

<!-- no-run: trains for many minutes -->
```bash
moesaic reproduce --list
moesaic reproduce deepseekmoe --seeds 0,1,2
moesaic reproduce deepseekmoe --set train.steps=600 -o runs/longer
```

Ctrl-C stops with a checkpoint of every running arm, and the same command goes on. Size `cpu` takes minutes on two cores,
size `gpu` is nearer to the paper and takes hours on one accelerator.

| command | question | claims |
|---|---|---|
{rows}

## How claims are judged

Each claim is a number that is above zero where it is true: mostly a difference between two arms that started from the same
seed and saw the same text in the same order. Over seeds it *holds* where a one-sided t-test says so at 5 %, it *does not
hold* where the test says the opposite, and is *not resolved* otherwise: few seeds of small models leave much unresolved.
"""


def _section(section: Section, found: Reproduction, *, plotted: bool, stem: str) -> list[str]:
    table = section.table(found) if section.table is not None else ""
    figure = f"![{section.caption or section.title}]({stem}-{section.stem}.svg)"
    return [
        f"## {section.title}",
        *section.text.split("\n\n"),
        table,
        figure if plotted and section.draw is not None else "",
    ]


def _claims(judgements: Sequence[Judgement]) -> str:
    rows = ["| claim | advantage | over seeds | verdict |", "|---|---|---|---|"]
    for judgement in judgements:
        source = f" ({judgement.claim.source})" if judgement.claim.source else ""
        rows.append(
            f"| {judgement.claim.name}{source} | {judgement.claim.success} | {spread(judgement.values, 4, signed=True)} "
            f"| **{judgement.verdict}** |"
        )
    return "\n".join(rows)


def _arms(found: Reproduction) -> str:
    domains = [name for name in _first(found).measurements if name.startswith("loss.")]
    heads = [
        "arm",
        "is",
        "stored",
        "active",
        "tokens",
        "tokens/s",
        "loss",
        *(name.removeprefix("loss.") for name in domains),
    ]
    rows = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name in found.arms:
        arm = found.experiment.arms[name]
        results = [found.results[seed][name] for seed in found.seeds]
        cells = [
            f"`{name}`",
            arm.text + (f"; starts from `{arm.parent}`" if arm.parent else ""),
            short(results[0].parameters),
            short(results[0].active_parameters),
            f"{results[0].tokens:,}",
            f"{statistics.fmean(result.tokens / max(result.seconds, 1e-9) for result in results):,.0f}",
            *(spread(_values(results, measure), 4) for measure in ("loss", *domains)),
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def _of_arms(found: Reproduction) -> str:
    """What the table of arms holds."""
    return (
        f"Losses are on held-out text, in nats for a token; mean ± standard deviation over seeds. Tokens/s with "
        f"{found.jobs} arm{'s' if found.jobs > 1 else ''} side by side{', one thread each' if found.jobs > 1 else ''}."
    )


def _given(found: Reproduction) -> str:
    """Models that a user brought, in place of the table of arms."""
    rows = ["| arm | is | stored | active |", "|---|---|---|---|"]
    for name in found.arms:
        result = found.results[found.seeds[0]][name]
        # Its name, not where it lies on somebody's machine.
        model = str(result.run["checkpoint"]["path"]).rstrip("/").rpartition("/")[2]
        rows.append(f"| `{name}` | {model} | {short(result.parameters)} | {short(result.active_parameters)} |")
    return "\n".join(rows)


def _measurements(found: Reproduction) -> str:
    columns = found.experiment.columns
    rows = [f"| arm | {' | '.join(column.heading for column in columns.values())} |", "|---" * (len(columns) + 1) + "|"]
    for name in found.arms:
        results = [found.results[seed][name] for seed in found.seeds]
        cells = [spread(_values(results, measure), column.digits) for measure, column in columns.items()]
        if any(cells):
            rows.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(rows) if len(rows) > 2 else ""


def _wrapped(part: str) -> str:
    """Paragraphs and lists in lines of at most 120 characters; tables, code and headings as they are."""
    if part.startswith(("|", "#", "<", "!")):
        return part
    lines = part.split("\n") if part.startswith("- ") else [part]
    return "\n".join(
        textwrap.fill(
            line,
            120,
            subsequent_indent="  " if line.startswith("- ") else "",
            break_long_words=False,
            break_on_hyphens=False,
        )
        for line in lines
    )


def _first(found: Reproduction) -> ArmResult:
    return found.results[found.seeds[0]][found.experiment.control]


def _values(results: Sequence[ArmResult], measure: str) -> list[float]:
    return [result.measurements[measure] for result in results if measure in result.measurements]


def spread(values: Sequence[float], digits: int, *, signed: bool = False) -> str:
    """Mean and standard deviation over seeds, in words; empty without values."""
    if not values:
        return ""
    mean = f"{statistics.fmean(values):{'+' if signed else ''}.{digits}f}"
    if len(values) < 2 or any(math.isnan(value) for value in values):
        return mean
    return f"{mean} ± {statistics.stdev(values):.{digits}f}"


def _quoted(override: str) -> str:
    return override if not set(override) & set(" '\"{}[]*?$&;|<>()") else "'" + override.replace("'", "'\\''") + "'"
