"""`moesaic export`: one of our checkpoints goes back to its stock family."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moesaic.cli.console import Json, emit_json, results
from moesaic.cli.models import ShardSize, check_output, load, save
from moesaic.errors import UnsupportedExport
from moesaic.hf import MoesaicForCausalLM, export


def command(
    source: Annotated[Path, typer.Argument(help="Folder of a moesaic model.")],
    output: Annotated[Path, typer.Argument(help="Folder to write.")],
    max_shard_size: ShardSize = "5GB",
    overwrite: Annotated[bool, typer.Option(help="Replace the output folder.")] = False,
    json: Json = False,
) -> None:
    """Export a moesaic model to the stock transformers family that computes exactly the same.

    Where no family does, the command says which part stands in the way and writes nothing.

    Example: moesaic export ./qwen3-moesaic ./Qwen3-back
    """
    check_output(output, overwrite)
    model, folder = load(source)
    if not isinstance(model, MoesaicForCausalLM):
        raise UnsupportedExport(
            f"source = {str(source)!r} is a {type(model).__name__}, not a moesaic model; it needs no export"
        )
    stock = export(model)
    save(stock, folder, output, max_shard_size=max_shard_size)
    if json:
        emit_json({"output": str(output), "architecture": type(stock).__name__})
    else:
        results.print(f"Wrote {output} as {type(stock).__name__}.")
