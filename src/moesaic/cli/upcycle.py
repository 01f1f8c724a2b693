"""`moesaic upcycle`: a dense checkpoint becomes an MoE checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from transformers import PreTrainedModel

from moesaic.cli.console import Json, Set
from moesaic.cli.models import ShardSize, announce, check_output, load, save
from moesaic.configuration import apply_overrides, read_yaml
from moesaic.errors import ConfigError
from moesaic.layer import MoESpec
from moesaic.transform import copy_spec, upcycle


def command(
    source: Annotated[Path, typer.Argument(help="Folder of a dense model (llama, qwen3, gemma2, gpt2, ...).")],
    output: Annotated[Path, typer.Argument(help="Folder to write.")],
    num_experts: Annotated[int, typer.Option(min=1, help="Copies of each feed-forward network.")] = 8,
    top_k: Annotated[int, typer.Option(min=1, help="Experts for each token.")] = 2,
    config: Annotated[Path | None, typer.Option(help="YAML file whose `moe` section to use instead.")] = None,
    overrides: Set = None,
    noise: Annotated[float, typer.Option(min=0.0, help="Relative noise on each copy, to break their symmetry.")] = 0.0,
    inexact: Annotated[bool, typer.Option(help="Accept logits that differ from the dense model's at step 0.")] = False,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of router weights and noise.")] = 0,
    max_shard_size: ShardSize = "5GB",
    overwrite: Annotated[bool, typer.Option(help="Replace the output folder.")] = False,
    json: Json = False,
) -> None:
    """Make a Mixture-of-Experts model of a dense one by copying its feed-forward networks.

    Before any training its logits are those of the dense model, unless --noise or --inexact allow otherwise.

    Example: moesaic upcycle ./Qwen3-0.6B ./qwen3-8x --num-experts 8 --top-k 2 --set moe.layers.every=2
    """
    check_output(output, overwrite)
    dense, folder = load(source)
    values = read_yaml(config) if config else {"moe": _copied(dense, num_experts, top_k)}
    section = apply_overrides(values, overrides or []).get("moe")
    if not isinstance(section, dict):
        raise ConfigError(
            "moe", section, f"is not a section of {config}", "write the MoE layers there, or leave it out"
        )
    spec = MoESpec.from_dict(section, where="moe")
    model = upcycle(dense, spec, noise=noise, exact=not (inexact or noise), seed=seed)
    save(model, folder, output, max_shard_size=max_shard_size)
    announce(model, output, json=json)


def _copied(dense: PreTrainedModel, num_experts: int, top_k: int) -> dict[str, Any]:
    """The spec of a copy, without the defaults of its router: overrides may choose another one, with other fields."""
    spec = copy_spec(dense, num_experts=num_experts, top_k=top_k)
    return {**spec.to_dict(), "router": spec.router.model_dump(mode="json", exclude_defaults=True)}
