"""The parts of a trace on disk: their names, what each says of itself, and the errors of those that can't be read."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from moesaic.configuration import Config
from moesaic.errors import ConfigError, TraceError
from moesaic.trace.header import VERSION, LayerFacts, TraceHeader
from moesaic.trace.storage.parquet import HEADER_KEY, NO_STEP, PART_KEY

_NAME = re.compile(r"part-(\d+)-(\d+)\.parquet")


class PartFacts(Config):
    """What a part says of itself.

    Attributes:
        rank: process that wrote it.
        number: which of that process's parts it is, from 0.
        rows: rows in it.
        first_step: first optimiser step in it; -1 outside training.
        last_step: last optimiser step in it; -1 outside training.
        next_document: number of the document that comes after those which its process has seen so far.
    """

    rank: int
    number: int
    rows: int
    first_step: int = NO_STEP
    last_step: int = NO_STEP
    next_document: int = 0


@dataclass(frozen=True)
class Part:
    """One part of a trace.

    Attributes:
        path: its file.
        header: what was traced.
        facts: what it says of itself.
        metadata: of Parquet: row groups with the range of each column.
    """

    path: Path
    header: TraceHeader
    facts: PartFacts
    metadata: pq.FileMetaData


def part_name(rank: int, number: int) -> str:
    """Name of the file."""
    return f"part-{rank:03d}-{number:05d}.parquet"


def part_files(folder: Path) -> list[Path]:
    """The whole parts in a folder, by process and number."""
    found = [(match, path) for path in folder.glob("part-*.parquet") if (match := _NAME.fullmatch(path.name))]
    return [path for match, path in sorted(found, key=lambda item: (int(item[0][1]), int(item[0][2])))]


def read_part(path: Path) -> Part:
    """Read what a part says of itself.

    Raises:
        TraceError: if it is damaged or cut short, no part of a trace, or of a newer format.
    """
    try:
        metadata = pq.read_metadata(path, memory_map=False)
    except (pa.ArrowException, OSError) as error:
        raise damaged(path, error) from error
    stored = metadata.metadata or {}
    if HEADER_KEY not in stored or PART_KEY not in stored:
        raise TraceError(f"{path} was not written by moesaic: it has no header of a trace; remove it from the folder")
    values = json.loads(stored[HEADER_KEY])
    version = values.get("version")
    if not isinstance(version, int) or version > VERSION:
        raise TraceError(
            f"{path} has version {version} of the trace format and this moesaic reads up to {VERSION}; "
            "update moesaic, or read the columns with pandas"
        )
    try:
        header = TraceHeader.from_dict(_known(values, TraceHeader))
        facts = PartFacts.from_dict(_known(json.loads(stored[PART_KEY]), PartFacts))
    except ConfigError as error:
        raise TraceError(f"{path} has a header that can't be read ({error}); record the trace again") from error
    return Part(path, header, facts, metadata)


def _known(values: dict[str, Any], kind: type[Config]) -> dict[str, Any]:
    """Without the fields that later versions of moesaic have added; see the versioning rule."""
    known = {name: value for name, value in values.items() if name in kind.model_fields}
    if kind is TraceHeader:
        known["layers"] = {index: _known(facts, LayerFacts) for index, facts in values.get("layers", {}).items()}
    return known


def remove_steps_after(folder: Path, step: int) -> None:
    """Remove what a run wrote after the optimiser step from which it goes on, and what it left unfinished.

    Raises:
        TraceError: if a part holds steps before and after it.
    """
    for unfinished in folder.glob(".part-*.tmp"):
        unfinished.unlink(missing_ok=True)
    for path in part_files(folder):
        facts = read_part(path).facts
        if facts.last_step <= step:
            continue
        if facts.first_step <= step:
            raise TraceError(
                f"{path} holds steps {facts.first_step} to {facts.last_step}, and the run goes on after step {step}; "
                "trace into another folder, or remove this part"
            )
        path.unlink()


def damaged(path: Path, error: Exception) -> TraceError:
    """The error for a part whose bytes are wrong."""
    reason = str(error).partition("\n")[0][:200]
    return TraceError(
        f"{path} is damaged or cut short ({reason}); the other parts are whole: remove this one, or record again"
    )


def joined_header(parts: list[Part]) -> TraceHeader:
    """The header of all parts together: all their domains, and the widest selections of each layer.

    Raises:
        TraceError: if they are not parts of one trace.
    """
    first = parts[0]
    layers = dict(first.header.layers)
    domains = list(first.header.domains)
    for part in parts[1:]:
        difference = header_difference(first.header, part.header)
        if difference is not None:
            name, one, other = difference
            raise TraceError(
                f"{first.path} and {part.path.name} are parts of different traces: {name} is {one!r} and {other!r}; "
                "move them to folders of their own"
            )
        for index, facts in part.header.layers.items():
            known = layers.get(index, facts)
            layers[index] = facts.model_copy(update={"top_k": max(known.top_k, facts.top_k)})
        domains += [name for name in part.header.domains if name not in domains]
    return first.header.model_copy(update={"layers": dict(sorted(layers.items())), "domains": tuple(domains)})


def header_difference(one: TraceHeader, other: TraceHeader) -> tuple[str, object, object] | None:
    """The first field in which two headers can't be of one trace, with both values; None if they can be."""
    for name in ("version", "model_type", "vocab_size", "tokenizer", "sample", "has_scores"):
        if getattr(one, name) != getattr(other, name):
            return name, getattr(one, name), getattr(other, name)
    for index in sorted(one.layers.keys() & other.layers.keys()):
        for name in ("num_experts", "num_null", "router", "selects"):
            values = tuple(getattr(header.layers[index], name) for header in (one, other))
            if values[0] != values[1]:
                return f"layers.{index}.{name}", *values
    return None
