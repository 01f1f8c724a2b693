"""`moesaic catalog show`: one model, mechanism or loss."""

from __future__ import annotations

from typing import Annotated, Any

import typer
import yaml
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from moesaic.catalog import (
    DECISIONS,
    CannotCount,
    DtypeName,
    Mechanism,
    ModelRecord,
    RoutingLoss,
    equations,
    losses,
    mechanisms,
    models,
)
from moesaic.catalog.counting import bits
from moesaic.catalog.load import did_you_mean
from moesaic.cli.catalog.mechanisms import facts
from moesaic.cli.console import Json, emit_json, results
from moesaic.errors import ConfigError
from moesaic.trace.accounting import short


def command(
    name: Annotated[str, typer.Argument(help="A model, a mechanism, or a loss.")],
    dtype: Annotated[str, typer.Option(help="fp32, bf16, fp16, fp8, int8 or int4, for memory.")] = "bf16",
    context_length: Annotated[int, typer.Option(min=1, help="Positions attended to, for FLOPs and the cache.")] = 4096,
    json: Json = False,
) -> None:
    """Show one entry: of a model its parameters, recomputed and printed, FLOPs for a token and memory.

    A name that a model and a mechanism share shows both.

    Example: moesaic catalog show deepseek-v3 --dtype fp8 --context-length 32768
    """
    bits(dtype)
    found_models = {record.name: record for record in models()}
    found_mechanisms = {entry.name: entry for entry in mechanisms()}
    found_losses = {loss.name: loss for loss in losses()}
    record, entry, loss = found_models.get(name), found_mechanisms.get(name), found_losses.get(name)
    if record is None and entry is None and loss is None:
        hint = did_you_mean(name, {*found_models, *found_mechanisms, *found_losses})
        raise ConfigError(
            "name", name, "is not in the catalogue", f"{hint}`moesaic catalog models` and `... mechanisms` list it"
        )
    if json:
        emit_json(
            {
                "model": None if record is None else model_facts(record, dtype, context_length),
                "mechanism": None if entry is None else facts(entry),
                "loss": None if loss is None else loss.to_dict(),
            }
        )
        return
    if record is not None:
        _print_model(record, dtype, context_length)
    if entry is not None:
        _print_mechanism(entry)
    if loss is not None:
        _print_loss(loss)


def model_facts(record: ModelRecord, dtype: DtypeName | str, context_length: int) -> dict[str, Any]:
    """A record for machines, with its size or the reason why it has none."""
    values = record.to_dict()
    try:
        size = record.size()
    except CannotCount as error:
        return {**values, "size": None, "no_size": str(error)}
    return {**values, "size": size.to_dict(context_length=context_length, dtype=dtype), "no_size": None}  # type: ignore[arg-type]


def _print_model(record: ModelRecord, dtype: str, context_length: int) -> None:
    shape, table = record.shape, _facts(record.title)
    table.add_row("name", record.name)
    table.add_row("published", _paper(record.year, record.arxiv))
    table.add_row("kind", ", ".join(filter(None, [record.architecture, record.details])))
    encoder = f"{shape.encoder_layers} in an encoder and " if shape.encoder_layers else ""
    table.add_row("layers", f"{encoder}{shape.layers}, of which {len(shape.moe_layers)} are MoE")
    table.add_row("hidden width", f"{shape.hidden:,}")
    table.add_row("attention", _attention(record))
    table.add_row("experts", f"{record.picks}, width {_number(shape.expert_width)}")
    if shape.shared_width:
        table.add_row("shared width", f"{shape.shared_width:,}")
    if shape.dense_width and len(shape.moe_layers) < shape.layers:
        table.add_row("dense width", f"{shape.dense_width:,}")
    table.add_row("activation", shape.activation)
    table.add_row("vocabulary", _number(shape.vocabulary) + (", tied" if shape.tied_embeddings else ""))
    norm = {True: ", weights sum to 1", False: ", weights as they are", None: ""}[record.router.normalized]
    table.add_row("router", record.router.kind + norm + (f"; {record.router.details}" if record.router.details else ""))
    for loss in record.losses:
        weight = "weight not published" if loss.coefficient is None else f"{loss.coefficient:g}"
        table.add_row("loss", f"{loss.loss}: {loss.details or weight}")
    table.add_row("read in", ", ".join(record.verified))
    table.add_row("source", record.source)
    results.print(table)
    _print_size(record, dtype, context_length)
    for note in record.notes:
        results.print(f"- {note}", markup=False)
    if record.unbuildable is not None:
        near = ", ".join(record.unbuildable.near)
        results.print(f"It can't be built: {record.unbuildable.reason}. Near are {near}.", markup=False)
        return
    for deviation in record.deviations:
        results.print(f"[yellow]Built otherwise:[/] {escape(deviation)}")
    results.print(f"Build it: moesaic catalog build {record.name} --shrink -o {record.name}.yaml", markup=False)


def _print_size(record: ModelRecord, dtype: str, context_length: int) -> None:
    published = record.published
    table = Table("parameters", box=SIMPLE_HEAD)
    for name in ("recomputed", "printed", "what is printed"):
        table.add_column(name, justify="left" if name.startswith("what") else "right")
    try:
        size = record.size()
    except CannotCount as error:
        size = None
        results.print(f"Parameters can't be recomputed: {error}.", markup=False)
    for name in ("total", "active"):
        printed = None if published is None else getattr(published, name)
        counted = "-" if size is None else short(getattr(size, name))
        if printed is None:
            table.add_row(name, counted, "-", "")
        else:
            what = printed.counts.replace("_", " ")
            if size is not None and printed.counts != "model":
                what += f": {short(getattr(size.counted(printed.counts), name))}"
            table.add_row(name, counted, short(1e9 * printed.billions), what)
    results.print(table)
    if size is None:
        return
    known: Any = dtype
    cost = _facts(None)
    cost.add_row(
        "forward pass",
        f"{size.flops_per_token(context_length) / 1e9:,.2f} GFLOPs a token at {context_length:,} positions",
    )
    cost.add_row("weights", f"{_bytes(size.weight_bytes(known))} in {dtype}")
    cache = size.cache_bytes_per_token(known)
    cost.add_row(
        "cache", f"{_bytes(cache)} a token, {_bytes(cache * context_length)} for {context_length:,}, in {dtype}"
    )
    results.print(cost)


def _print_mechanism(entry: Mechanism) -> None:
    table = _facts(entry.title)
    table.add_row("name", entry.name)
    table.add_row("published", _paper(entry.year, entry.arxiv, entry.reference, entry.unverified))
    table.add_row("in the tree", "\n".join((entry.path, *entry.also)))
    table.add_row("what it is", entry.line)
    known = equations()
    for number in entry.equations:
        table.add_row(number, escape(known[number]))
    table.add_row("moesaic", f"{entry.decision.replace('_', ' ')} ({DECISIONS[entry.decision]})")
    if entry.reason:
        table.add_row("", escape(entry.reason))
    if entry.causal:
        table.add_row("causal", {"evaluation": "in evaluation only"}.get(entry.causal, entry.causal))
    for title, values in (("losses", entry.losses), ("models", entry.models), ("files", entry.files)):
        if values:
            table.add_row(title, "\n".join(values))
    if entry.page:
        table.add_row("page", f"docs/{entry.page}")
    results.print(table)
    if entry.moe:
        typer.echo("As a section of a run:\n")
        typer.echo(yaml.safe_dump({"moe": entry.moe}, sort_keys=False, default_flow_style=None, width=110))


def _print_loss(loss: RoutingLoss) -> None:
    table = _facts(f"{loss.name} ({loss.number})")
    table.add_row("formula", escape(loss.formula))
    table.add_row("balanced", str(loss.balanced))
    table.add_row("used with", escape(loss.weight))
    table.add_row("moesaic", f"{loss.decision.replace('_', ' ')}{'; ' + loss.reason if loss.reason else ''}")
    if loss.file:
        table.add_row("file", loss.file)
    results.print(table)
    if loss.balance:
        typer.echo(yaml.safe_dump({"balance": [loss.balance]}, sort_keys=False, default_flow_style=None))


def _facts(title: str | None) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, show_header=False)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column()
    return table


def _attention(record: ModelRecord) -> str:
    shape, latent = record.shape, record.shape.latent_attention
    if latent is not None:
        queries = "" if latent.query_rank is None else f", queries of rank {latent.query_rank:,}"
        return f"{shape.heads} heads, latent keys and values of rank {latent.key_value_rank:,}{queries}"
    experts = shape.attention_experts
    routed = "" if experts is None else f", {experts.top_k} of {experts.num_experts} experts"
    return f"{shape.heads} heads of {shape.head_dim}, {shape.kv_heads} of keys and values{routed}"


def _paper(year: int, arxiv: str | None, reference: str | None = None, unverified: bool = False) -> str:
    if arxiv is None:
        return f"{year}{', ' + reference if reference else ''}"
    return f"{year}, https://arxiv.org/abs/{arxiv}{' (number not verified)' if unverified else ''}"


def _number(value: int | None) -> str:
    return "not published" if value is None else f"{value:,}"


def _bytes(number: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= size:
            return f"{number / size:,.1f} {unit}"
    return f"{number:,.0f} B"
