"""`moesaic convert`: a stock MoE checkpoint becomes one of ours."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moesaic.cli.console import Json
from moesaic.cli.models import ShardSize, announce, check_output, load, save
from moesaic.errors import UnsupportedModel
from moesaic.hf import MoesaicForCausalLM, convert


def command(
    source: Annotated[Path, typer.Argument(help="Folder of a stock MoE model (mixtral, qwen3_moe, deepseek_v3, ...).")],
    output: Annotated[Path, typer.Argument(help="Folder to write.")],
    max_shard_size: ShardSize = "5GB",
    overwrite: Annotated[bool, typer.Option(help="Replace the output folder.")] = False,
    json: Json = False,
) -> None:
    """Convert a stock transformers MoE model to moesaic's format, with the same logits.

    Example: moesaic convert ./Qwen3-30B-A3B ./qwen3-moesaic
    """
    check_output(output, overwrite)
    stock, folder = load(source)
    if isinstance(stock, MoesaicForCausalLM):
        raise UnsupportedModel(f"source = {str(source)!r} is a moesaic model already; use it as it is")
    model = convert(stock)
    save(model, folder, output, max_shard_size=max_shard_size)
    announce(model, output, json=json)
