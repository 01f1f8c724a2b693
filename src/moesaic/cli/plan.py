"""`moesaic plan`: memory and time of a run in every layout of a cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from transformers import PreTrainedModel

from moesaic.cli.console import Json, Set, emit_json, errors, results
from moesaic.cli.models import run_on_meta
from moesaic.data.objective.config import ul2_of
from moesaic.dist.plan import (
    Cluster,
    Plan,
    Workload,
    draw_memory,
    parallel_yaml,
    plan,
    read_bytes,
    read_link,
    read_rate,
    tables,
)
from moesaic.dist.plan.quantities import short
from moesaic.errors import ConfigError
from moesaic.hf import MoesaicForCausalLM
from moesaic.layer import MoESpec
from moesaic.train import RunConfig


def command(
    config: Annotated[Path, typer.Argument(help="YAML file of a run.")],
    hosts: Annotated[int, typer.Option(min=1, help="Machines.")] = 1,
    gpus: Annotated[int, typer.Option(min=1, help="Devices of each machine, one process each.")] = 1,
    memory: Annotated[str, typer.Option(help="Memory of a device, as 80GB or 80GiB.")] = "80GB",
    flops: Annotated[
        str, typer.Option(help="Floating-point operations a second that a device reaches in training, as 400T.")
    ] = "400T",
    link: Annotated[
        str,
        typer.Option(metavar="RATE[:LATENCY]", help="Link of a device to other hosts: 50GB/s:10us, or Gb/s in bits."),
    ] = "50GB/s:10us",
    inner_link: Annotated[
        str, typer.Option(metavar="RATE[:LATENCY]", help="Link of a device to others of its host.")
    ] = "450GB/s:3us",
    headroom: Annotated[
        float, typer.Option(min=0, max=0.99, help="Share of the memory to leave for the driver and fragmentation.")
    ] = 0.1,
    overlap: Annotated[
        float, typer.Option(min=0, max=1, help="Share of compute behind which gathers and reductions hide; 0 on CPUs.")
    ] = 1.0,
    top: Annotated[int, typer.Option(min=1, help="Layouts to print.")] = 10,
    plot: Annotated[Path | None, typer.Option(help="Also draw the memory of these layouts: .svg or .png.")] = None,
    overrides: Set = None,
    json: Json = False,
) -> None:
    """Predict memory and step time of a run in every layout of a cluster, before it is rented.

    Parameters, gradients and optimiser are counted from shapes, activations by a pass of the model on tensors without
    memory, communication with alpha + bytes * beta on each link. Prints the layouts that fit, best first, why others do
    not, and the `parallel` section of the best to paste.

    Example: moesaic plan run.yaml --hosts 2 --gpus 8 --memory 80GB --link 50GB/s:10us
    """
    run = RunConfig.from_yaml(config, overrides or [])
    cluster = Cluster(
        hosts,
        gpus,
        memory=read_bytes("--memory", memory),
        flops=read_rate("--flops", flops),
        inner=read_link("--inner-link", inner_link),
        outer=read_link("--link", link),
        headroom=headroom,
        overlap=overlap,
    )
    model = run_on_meta(run)
    with errors.status("") as status:
        found = plan(
            model,
            _spec(model),
            _workload(run),
            cluster,
            getattr(run, "parallel", None),
            tell=lambda text: status.update(f"{text} …"),
        )
    if plot is not None:
        draw_memory(found, plot, top=top)
    _print(found, top=top, json=json)
    if found.best is None:
        least = min(found.candidates, key=lambda candidate: candidate.memory.peak)
        raise ConfigError(
            "--memory",
            memory,
            f"is too little for every layout of {cluster.world} ranks",
            f"the least is {short(least.memory.peak / (1 - headroom))}B; or more ranks, shorter sequences, a smaller "
            "data.batch_size with train.accumulation_steps, or train.gradient_checkpointing",
        )


def _print(found: Plan, *, top: int, json: bool) -> None:
    if json:
        emit_json(found.to_dict())
        return
    results.print(tables(found, top=top))
    if found.best is not None:
        results.print("To use the best, add to the run:\n", highlight=False)
        typer.echo(parallel_yaml(found, found.best))


def _spec(model: PreTrainedModel) -> MoESpec | None:
    return model.config.spec if isinstance(model, MoesaicForCausalLM) else None


def _workload(run: RunConfig) -> Workload:
    inputs = ["position_ids"] if run.data.isolate_documents else []
    inputs += ["attention_mask"] if ul2_of(run.data.objective) else []
    labels = {"modality": "modality_ids", "task": "task_ids"}
    inputs += [labels[run.data.domains_are]] if run.data.domains_are in labels else []
    return Workload(
        batch_size=run.data.batch_size,
        sequence_length=run.data.sequence_length,
        accumulation_steps=run.train.accumulation_steps,
        bf16=run.train.precision == "bf16",
        gradient_checkpointing=run.train.gradient_checkpointing,
        accelerated=run.train.device != "cpu",
        inputs=tuple(inputs),
    )
