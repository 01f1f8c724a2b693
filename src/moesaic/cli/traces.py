"""Traces for commands: of a model that reads text, of its checkpoints, of a model to compare with, or from files."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moesaic.cli.console import errors
from moesaic.cli.models import load, positions_of, tokenizer_of
from moesaic.errors import ConfigError, DataError, TraceError
from moesaic.trace import RoutingLog, RoutingTrace, TraceFile, check_tokenizer, tokenizer_fingerprint, trace_batches
from moesaic.trace.report import Named
from moesaic.train.loop import CHECKPOINTS

Batches = Mapping[str, list[Mapping[str, Any]]]
PROMPTS = "prompt"


def read_batches(batches: Mapping[str, Iterable[Mapping[str, Any]]], max_tokens: int) -> Batches:
    """The beginning of each domain, of about so many tokens, so that several models read the same."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for domain, given in batches.items():
        found[domain], seen = [], 0
        for batch in given:
            found[domain].append(batch)
            seen += int((batch["document_ids"] >= 0).sum())
            if seen >= max_tokens:
                break
    return found


def prompt_batches(prompts: list[str], tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> Batches:
    """Each prompt as a text of its own.

    Raises:
        DataError: if a prompt is empty, or longer than the model's positions.
    """
    found: list[Mapping[str, Any]] = []
    for prompt in prompts:
        ids = torch.tensor([tokenizer(prompt)["input_ids"]], dtype=torch.int64)
        positions = positions_of(model)
        if not ids.numel() or (positions is not None and ids.shape[1] > positions):
            problem = (
                "has no tokens" if not ids.numel() else f"has {ids.shape[1]} tokens, the model {positions} positions"
            )
            raise DataError(f"--prompt {prompt[:40]!r} {problem}; give another text")
        found.append({"input_ids": ids, "document_ids": torch.zeros_like(ids)})
    return {PROMPTS: found} if found else {}


@dataclass
class Recorder:
    """Lets models read the same batches, with a bar on the terminal.

    Attributes:
        batches: by domain.
        tokenizer: that made their ids; other models must have the same. None where traces without one are all there is.
        quiet: no bar.
    """

    batches: Batches
    tokenizer: PreTrainedTokenizerBase | None
    quiet: bool = False

    def record(self, network: PreTrainedModel, name: str) -> RoutingTrace:
        """The routing of all batches."""
        with self._advancing(name) as batches:
            return trace_batches(network, batches, max_tokens=2**62, tokenizer=self.tokenizer)

    def log_of(self, path: Path, option: str) -> RoutingLog:
        """The trace at `path`, or that of the model at `path`.

        Raises:
            TraceError: if it has another tokenizer.
            CheckpointError: if there is neither.
        """
        if is_trace(path):
            return opened(path, self.tokenizer)
        network, folder = load(path)
        self._check(network, folder, option, path)
        return self.record(network, str(path))

    def _check(self, network: PreTrainedModel, folder: Path, option: str, path: Path) -> None:
        try:
            theirs = tokenizer_fingerprint(tokenizer_of(folder, network))
        except DataError:
            return  # it has none of its own, so it is given this one's ids
        assert self.tokenizer is not None, "it made the ids of the batches"
        mine = tokenizer_fingerprint(self.tokenizer)
        if theirs != mine:
            raise TraceError(
                f"{option} {path} has another tokenizer ({theirs}) than the model ({mine}), so their tokens are not the "
                "same; give a model with the same tokenizer"
            )

    @contextmanager
    def _advancing(self, name: str) -> Iterator[Mapping[str, Iterable[Mapping[str, Any]]]]:
        columns = (
            TextColumn("reading with {task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        hidden = self.quiet or not errors.is_terminal
        with Progress(*columns, console=errors, transient=True, disable=hidden) as progress:
            task = progress.add_task(name, total=sum(map(len, self.batches.values())))

            def counted(batches: list[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
                for batch in batches:
                    yield batch
                    progress.advance(task)

            yield {domain: counted(batches) for domain, batches in self.batches.items()}


def is_trace(path: Path) -> bool:
    """Whether `path` is a trace: a folder with parts of one, or a part."""
    return path.suffix == ".parquet" or (path.is_dir() and any(path.glob("part-*.parquet")))


def opened(path: Path, tokenizer: PreTrainedTokenizerBase | None) -> TraceFile:
    """The trace at `path`.

    Raises:
        TraceError: if it is damaged, or another tokenizer made it.
    """
    log = TraceFile(path)
    if tokenizer is not None:
        check_tokenizer(log, tokenizer)
    return log


def checkpoint_logs(recorder: Recorder, folders: list[Path], log: RoutingLog, model: Path | None) -> list[Named]:
    """Traces of checkpoints, by step where folders are named by it; the model's own folder is left out.

    Args:
        recorder: reads the text.
        folders: checkpoints, traces, or folders of several.
        log: the trace that they are held against.
        model: its folder.

    Raises:
        ConfigError: if there is none, or one has other layers or experts.
    """
    found = [path for folder in folders for path in _checkpoints(folder)]
    found = [path for path in found if model is None or path.resolve() != model.resolve()]
    if not found:
        raise ConfigError(
            "--checkpoints", [str(folder) for folder in folders], "holds no earlier checkpoint", "give their folders"
        )
    named = []
    for path in found:
        theirs = recorder.log_of(path, "--checkpoints")
        mine, shape = _shape(log), _shape(theirs)
        if mine != shape:
            raise ConfigError(
                "--checkpoints",
                str(path),
                f"has experts by layer {shape} and the model {mine}",
                "give checkpoints of the same run",
            )
        step = re.search(r"step-(\d+)", path.name)
        named.append(Named(path.name if step is None else f"{int(step[1]):,}", theirs, step and int(step[1])))
    if all(checkpoint.step is not None for checkpoint in named):
        named.sort(key=lambda checkpoint: checkpoint.step or 0)
    return named


def _shape(log: RoutingLog) -> dict[int, int]:
    return {layer: facts.num_columns for layer, facts in sorted(log.header.layers.items())}


def _checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder of a run or of checkpoints, else the folder itself."""
    for place in (folder / CHECKPOINTS, folder):
        found = sorted(path for path in place.glob("step-*") if path.is_dir())
        if found:
            return found
    return [folder]
