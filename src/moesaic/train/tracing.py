"""The trace of a training run: which steps, documents and domains, and what a resumed run does with it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from moesaic.trace import StreamedTrace, record
from moesaic.trace.storage.parts import remove_steps_after
from moesaic.train.config import TraceConfig


def trace_folder(config: TraceConfig, output_dir: Path) -> Path:
    """Where the trace goes."""
    return output_dir / config.path


def rewind_trace(config: TraceConfig | None, output_dir: Path, step: int) -> None:
    """Before any process writes, remove what a run wrote after the step from which it goes on; one process does it.

    Raises:
        TraceError: if what is there can't be cut there.
    """
    if config is not None and trace_folder(config, output_dir).is_dir():
        remove_steps_after(trace_folder(config, output_dir), step)


class StepTrace:
    """The trace of the training steps; does nothing where the run asks for none.

    Args:
        trace: in the making, or None.
        every_steps: trace one step in so many.
        domains: names of the domains that batches number.
    """

    def __init__(self, trace: StreamedTrace | None, every_steps: int = 1, domains: Sequence[str] = ()) -> None:
        self._trace, self._every, self._domains = trace, every_steps, domains
        if trace is not None:
            trace.active = False

    @contextlib.contextmanager
    def of(self, step: int, batch: Mapping[str, Any]) -> Iterator[None]:
        """The forward pass over `batch`, in optimiser step `step` (from 1), runs inside this block."""
        trace = self._trace
        if trace is None or (step - 1) % self._every:
            yield
            return
        trace.step, trace.active = step, True
        with contextlib.ExitStack() as stack:
            stack.callback(setattr, trace, "active", False)
            if "document_ids" in batch:
                stack.enter_context(trace.documents(batch["document_ids"]))
            if "domain_ids" in batch and self._domains:
                stack.enter_context(trace.domain_ids(self._domains, batch["domain_ids"]))
            yield

    def finish_part(self) -> None:
        """Wait until all steps so far are on disk: a checkpoint must not be ahead of its trace.

        Raises:
            TraceError: if they could not be written.
        """
        if self._trace is not None:
            self._trace.finish_part()


@contextlib.contextmanager
def tracing(
    config: TraceConfig | None, model: nn.Module, output_dir: Path, rank: int, tokenizer: Any, domains: Sequence[str]
) -> Iterator[StepTrace]:
    """The trace of a run, open until the block ends.

    Raises:
        TraceError: if there is a trace of something else.
    """
    if config is None:
        yield StepTrace(None)
        return
    with record(
        model,
        trace_folder(config, output_dir),
        sample=config.sample,
        scores=config.scores,
        tokenizer=tokenizer,
        append=True,
        rank=rank,
    ) as trace:
        yield StepTrace(trace, config.every_steps, domains)
