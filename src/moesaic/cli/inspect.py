"""`moesaic inspect`: what a model is made of, and what its router does with text."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from moesaic.cli.console import Json, Set, emit_json, results
from moesaic.cli.models import load, model_folder, run_on_meta, tokenizer_of
from moesaic.cli.texts import Texts, batches_of, sequence_length_for
from moesaic.errors import ConfigError
from moesaic.hf import MoesaicForCausalLM, convert
from moesaic.layer.balance import max_violation
from moesaic.trace import StatisticsTables, account, router_statistics, trace_batches, watch_state, write_report
from moesaic.train import RunConfig


def command(
    model: Annotated[Path, typer.Argument(help="Folder of a model or of a training run, or the YAML file of a run.")],
    texts: Texts = None,
    report: Annotated[
        Path | None, typer.Option("--report", "-r", help="HTML file to write: the routing of text.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Trace about this many tokens of each domain.")] = 20_000,
    context_length: Annotated[int, typer.Option(min=1, help="Context for FLOPs per token.")] = 2048,
    tokenizer: Annotated[Path | None, typer.Option(help="Folder of the tokenizer, if it is not the model's.")] = None,
    overrides: Set = None,
    json: Json = False,
) -> None:
    """Print parameters (total and active), FLOPs per token and the layer plan; with text, draw the routing.

    With --text or --report, the model reads text (of its own run if none is given) and a self-contained HTML page
    shows expert load, balance, the tokens that experts prefer and which experts are picked together; a table says how
    many experts a token ran, by its frequency, what was null or dropped, where, and what a router's state decided.

    Example: moesaic inspect runs/demo/moe --report routing.html
    """
    if model.suffix in (".yaml", ".yml"):
        if texts or report:
            raise ConfigError("model", str(model), "has no weights to read text with", "give the folder of a model")
        accounting = account(run_on_meta(RunConfig.from_yaml(model, overrides or [])), context_length=context_length)
        emit_json(accounting.to_dict()) if json else results.print(accounting)
        return
    if overrides:
        raise ConfigError("--set", overrides[0], "changes nothing in a saved model", "inspect the YAML file of a run")
    if report is not None and report.is_dir():
        raise ConfigError("--report", str(report), "is a folder", "give the path of the HTML file to write")
    network, folder = load(model)
    if not isinstance(network, MoesaicForCausalLM) and getattr(network.config, "num_experts_per_tok", None):
        network = convert(network)
    accounting = account(network, context_length=context_length)
    summary = accounting.to_dict()
    if not json:
        results.print(accounting)
    if texts or report:
        report = report or Path("routing.html")
        names = tokenizer_of(folder, network, tokenizer)
        length = sequence_length_for(network)
        found = batches_of(texts, names, folder, batch_size=8, sequence_length=length)
        with found as batches, watch_state(network) as influence:
            trace = trace_batches(network, batches, max_tokens=max_tokens)
        statistics = router_statistics(network, trace, influence)
        facts = {"model": str(model_folder(model)), "text": ", ".join(texts or ["held out by the training run"])}
        write_report(report, trace, accounting, title=str(model), tokenizer=names, facts=facts, statistics=statistics)
        violation = {layer: float(max_violation(found.load_N)) for layer, found in trace.layers.items()}
        summary["routing"] = {
            "tokens": trace.num_tokens,
            "max_violation": violation,
            "routers": [asdict(row) for row in statistics],
            "report": str(report),
        }
        if not json:
            results.print(StatisticsTables(statistics))
            results.print(f"Routing of {trace.num_tokens:,} tokens: {report.resolve()}")
    if json:
        emit_json(summary)
