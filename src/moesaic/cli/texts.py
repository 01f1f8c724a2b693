"""Text given on the command line: `[DOMAIN=]PATH` arguments, or the held-out text of a model's own run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moesaic.cli.models import positions_of
from moesaic.data import TextBatches, TextSource, prepare_data
from moesaic.errors import ConfigError
from moesaic.train import RunConfig
from moesaic.train.checkpoint import RUN_FILE

Texts = Annotated[
    list[str] | None,
    typer.Option(
        "--text", "-t", metavar="[DOMAIN=]PATH", help="Text file, folder or glob; may be given several times."
    ),
]
_SEQUENCE_LENGTH = 256
BatchesByDomain = Mapping[str, Iterable[Mapping[str, Any]]]


@contextlib.contextmanager
def batches_of(
    texts: list[str] | None, tokenizer: PreTrainedTokenizerBase, folder: Path, *, batch_size: int, sequence_length: int
) -> Iterator[BatchesByDomain]:
    """Batches of the given texts, or of the text that the run which made `folder` held out.

    Raises:
        ConfigError: if no text is given and `folder` was not written by a run.
        DataError: if a text is missing or empty.
    """
    if texts:
        with TextBatches(
            [_source(text) for text in texts], tokenizer, sequence_length=sequence_length, batch_size=batch_size
        ) as given:
            yield given.by_domain
        return
    if not (folder / RUN_FILE).is_file():
        raise ConfigError("--text", None, "is required for a model that was not trained here", "give --text PATH")
    run = RunConfig.from_yaml(folder / RUN_FILE)
    cache = folder.parent.parent / "data"
    with TemporaryDirectory(prefix="moesaic-data-") as temporary:
        data = prepare_data(run.data, cache if cache.is_dir() else temporary)
        yield data.validation_batches(batch_size=batch_size)


def sequence_length_for(model: PreTrainedModel, wanted: int | None = None) -> int:
    """`wanted`, or else 256 or what the model has positions for.

    Raises:
        ConfigError: if `wanted` is more than the model's positions.
    """
    positions = positions_of(model)
    if wanted is None:
        return _SEQUENCE_LENGTH if positions is None else min(_SEQUENCE_LENGTH, positions)
    if positions is not None and wanted > positions:
        raise ConfigError(
            "--sequence-length", wanted, f"is more than the model's {positions} positions", f"choose 2 to {positions}"
        )
    return wanted


def _source(text: str) -> TextSource:
    domain, equals, path = text.partition("=")
    if not equals:
        path, domain = text, Path(text).stem or "text"
    if not path or not domain:
        raise ConfigError("--text", text, "lacks its domain or its path", "write it as DOMAIN=PATH or PATH")
    return TextSource.from_dict({"domain": domain, "paths": [path]}, where="--text")
