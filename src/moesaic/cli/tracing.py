"""Options with which commands write the routing of what they run to disk."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moesaic.trace import StreamedTrace, record

TracePath = Annotated[
    Path | None, typer.Option("--trace", help="Folder to write the routing to (docs: Traces), made anew.")
]
TraceSample = Annotated[
    float, typer.Option("--trace-sample", min=0.0, max=1.0, help="Share of the documents that --trace writes.")
]


@contextlib.contextmanager
def traced(
    path: Path | None, sample: float, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> Iterator[StreamedTrace | None]:
    """The trace of what `model` runs inside the block; None without a path.

    Raises:
        ConfigError: if `sample` is 0.
        TraceError: if there is a trace at `path` already.
    """
    if path is None:
        yield None
        return
    with record(model, path, sample=sample, tokenizer=tokenizer) as trace:
        yield trace


def labelled(
    trace: StreamedTrace | None, batches: Mapping[str, Iterable[Mapping[str, Any]]]
) -> Mapping[str, Iterable[Mapping[str, Any]]]:
    """The batches; while one is in use, `trace` knows its domain and its documents."""
    if trace is None:
        return batches

    def of(name: str, found: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
        with trace.domain(name):
            for batch in found:
                with trace.documents(batch["document_ids"]):
                    yield batch

    return {name: of(name, found) for name, found in batches.items()}


def trace_report(trace: StreamedTrace | None) -> dict[str, Any]:
    """What JSON output says of a trace that is finished; empty without one."""
    return {} if trace is None else {"trace": {"path": str(trace.path), "tokens": trace.num_tokens}}
