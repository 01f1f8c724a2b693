"""`moesaic catalog build`: a preset becomes a run to train, or a model folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from moesaic.catalog import Preset, preset, size_of
from moesaic.catalog.shape import Shape
from moesaic.cli.console import Json, emit_json, results
from moesaic.cli.models import announce, check_output, run_on_meta, save
from moesaic.configuration import Config
from moesaic.errors import ConfigError
from moesaic.files import write_text
from moesaic.hf import build
from moesaic.trace import account
from moesaic.train import RunConfig

_SUFFIXES = (".yaml", ".yml")
# A vocabulary up to this size is one that the run's own tokenizer makes.
_TRAINED_VOCABULARY = 4096
_LEAST_VOCABULARY = 258
_OF_THE_TOKENIZER = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")


def command(
    name: Annotated[str, typer.Argument(help="A model that can be built: `moesaic catalog models --buildable`.")],
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", help="RUN.yaml for a run to train, or a folder for a model with random weights."
        ),
    ],
    shrink: Annotated[
        bool,
        typer.Option("--shrink", help="A tiny model of the same design: few layers, small widths, at most 16 experts."),
    ] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace the output.")] = False,
    json: Json = False,
) -> None:
    """Write a published model as the YAML file of a run, or build it with random weights.

    The run trains on Python's documentation and library, which every machine has: change its data section. Look at the run of
    a large model with `moesaic inspect` and `moesaic plan`, which need no weights.

    Example: moesaic catalog build deepseek-v3 --shrink -o run.yaml
    """
    found = preset(name)
    check_output(output, overwrite)
    if shrink:
        found = found.shrink()
    if output.suffix in _SUFFIXES:
        run = RunConfig.from_dict(run_of(found, small=shrink))
        accounting = account(run_on_meta(run))
        write_text(output, run_text(found, small=shrink))
        if json:
            emit_json({"output": str(output), **accounting.to_dict()})
            return
        results.print(accounting)
        results.print(f"Wrote {output}. Next: moesaic {'train' if shrink else 'plan'} {output}")
        return
    _check_memory(found)
    model = build(found.backbone, found.moe)
    save(model, output, output, max_shard_size="5GB")
    announce(model, output, json=json)


def run_of(found: Preset, *, small: bool) -> dict[str, Any]:
    """The sections of a run that trains the preset; a small one takes its vocabulary from the tokenizer."""
    vocabulary = found.backbone["vocab_size"]
    left_out = _OF_THE_TOKENIZER if vocabulary <= _TRAINED_VOCABULARY else ()
    backbone = {key: value for key, value in found.backbone.items() if key not in left_out}
    length = min(256 if small else 4096, found.backbone.get("max_position_embeddings", 4096))
    return {
        "backbone": backbone,
        "moe": written(found.moe),
        "data": {
            "sources": [{"type": "python", "max_bytes": 3_000_000}],
            "tokenizer": {"type": "train_bpe", "vocab_size": max(vocabulary, _LEAST_VOCABULARY)},
            "sequence_length": length,
            "batch_size": 8,
        },
        "train": {"steps": 200, "learning_rate": 0.001 if small else 0.0003},
    }


def run_text(found: Preset, *, small: bool) -> str:
    """The YAML file of `run_of`, with what the preset says of itself as comments."""
    notes = [f"{found.title}: {found.source}", *found.notes]
    notes += [f"Built otherwise: {deviation}" for deviation in found.deviations]
    if not small:
        notes.append("The data section is a stand-in: give your text, and the tokenizer that fits the vocabulary.")
    body = yaml.safe_dump(run_of(found, small=small), sort_keys=False, default_flow_style=None, width=110)
    return "".join(f"# {note}\n" for note in notes) + body


def written(config: Config) -> dict[str, Any]:
    """The fields of a config that are not at their defaults, as one would write them."""
    found = {}
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if name == "type" or field.is_required() or value != field.get_default(call_default_factory=True):
            found[name] = _plain(value)
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, Config):
        return written(value)
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _check_memory(found: Preset) -> None:
    """Refuse to make weights that would take more than half of the machine's memory."""
    needed = size_of(Shape.of(found)).weight_bytes("fp32")
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there / 2:
        raise ConfigError(
            "name",
            found.name,
            f"needs {needed / 1e9:,.0f} GB for its weights, more than half of the {there / 1e9:,.0f} GB here",
            "add --shrink, or write a run with -o run.yaml",
        )
