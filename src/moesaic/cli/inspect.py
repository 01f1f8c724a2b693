"""`moesaic inspect`: what a model is made of, and what its router does with text."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moesaic.cli.console import Json, Set, emit_json, errors, results
from moesaic.cli.models import load, model_folder, run_on_meta, tokenizer_of
from moesaic.cli.texts import Texts, batches_of, sequence_length_for
from moesaic.cli.traces import Recorder, checkpoint_logs, is_trace, opened, prompt_batches, read_batches
from moesaic.data import load_tokenizer
from moesaic.errors import ConfigError, UnsupportedModel
from moesaic.files import write_text
from moesaic.hf import MoesaicForCausalLM, convert
from moesaic.layer import CapacityConfig
from moesaic.layer.balance import max_violation
from moesaic.trace import Accounting, RoutingLog, StatisticsTables, account, check_model, router_statistics, watch_state
from moesaic.trace.metrics import apply_capacity
from moesaic.trace.report import Named, Report, make_report
from moesaic.train import RunConfig


def command(
    model: Annotated[
        Path | None, typer.Argument(help="Folder of a model or of a training run, or the YAML file of a run.")
    ] = None,
    texts: Texts = None,
    prompts: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", help="Text to read, as it stands; may be given several times.")
    ] = None,
    report: Annotated[
        Path | None, typer.Option("--report", "-r", help="HTML file to write: the routing of text.")
    ] = None,
    checkpoints: Annotated[
        list[Path] | None,
        typer.Option(help="Earlier checkpoints, or a folder of them: how early was the routing learned?"),
    ] = None,
    compare: Annotated[Path | None, typer.Option(help="Another model, or a trace of the same text.")] = None,
    trace: Annotated[Path | None, typer.Option(help="Folder of a trace to report on instead of reading text.")] = None,
    figures: Annotated[Path | None, typer.Option(help="Folder for every plot as PNG and SVG.")] = None,
    capacity: Annotated[
        float | None,
        typer.Option(help="Show what a capacity of this factor would drop, whatever the model's own does."),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Trace about this many tokens of each domain.")] = 20_000,
    context_length: Annotated[int, typer.Option(min=1, help="Context for FLOPs per token.")] = 2048,
    tokenizer: Annotated[Path | None, typer.Option(help="Folder of the tokenizer, if it is not the model's.")] = None,
    overrides: Set = None,
    json: Json = False,
) -> None:
    """Print parameters (total and active), FLOPs per token and the layer plan; with text, draw the routing.

    With --text, --prompt or --report, the model reads text (of its own run if none is given) and a self-contained HTML page
    shows each token with its experts, expert load, balance, what experts specialise in, drops and null experts. MoE models
    of transformers are read as they are.

    Example: moesaic inspect runs/demo/moe --prompt "def main():" --report routing.html
    """
    wanted = bool(texts or prompts or report or checkpoints or compare or trace or figures or capacity)
    _check(model, texts, prompts, report, trace, figures, overrides, wanted)
    if model is not None and model.suffix in (".yaml", ".yml"):
        accounting = account(run_on_meta(RunConfig.from_yaml(model, overrides or [])), context_length=context_length)
        emit_json(accounting.to_dict()) if json else results.print(accounting)
        return
    network, folder, accounting = None, None, None
    if model is not None:
        network, folder = load(model)
        accounting = _account(network, context_length, needed=not wanted)
    if accounting is not None and not json:
        results.print(accounting)
    summary: dict[str, Any] = {} if accounting is None else accounting.to_dict()
    if wanted:
        names = _tokenizer(folder, network, tokenizer)
        sources = _Sources(model, texts, prompts, checkpoints, compare, trace, capacity, max_tokens, json)
        made = _report(sources, network, folder, names, accounting)
        path = report or Path("routing.html")
        write_text(path, made.to_html())
        drawn = made.save_figures(figures) if figures is not None else []
        summary["routing"] = _summary(made, path, figures)
        if not json:
            if made.subject.statistics:
                results.print(StatisticsTables(list(made.subject.statistics)))
            if drawn:
                results.print(f"{len(drawn)} files: {figures and figures.resolve()}")
            results.print(f"Routing of {made.subject.num_tokens:,} tokens: {path.resolve()}")
    if json:
        emit_json(summary)


def _check(
    model: Path | None,
    texts: list[str] | None,
    prompts: list[str] | None,
    report: Path | None,
    trace: Path | None,
    figures: Path | None,
    overrides: list[str] | None,
    wanted: bool,
) -> None:
    if model is None and trace is None:
        raise ConfigError("model", None, "is not given", "give the folder of a model, or --trace FOLDER")
    run = model is not None and model.suffix in (".yaml", ".yml")
    if run and wanted:
        raise ConfigError("model", str(model), "has no weights to read text with", "give the folder of a model")
    if overrides and not run:
        raise ConfigError("--set", overrides[0], "changes nothing in a saved model", "inspect the YAML file of a run")
    if report is not None and report.is_dir():
        raise ConfigError("--report", str(report), "is a folder", "give the path of the HTML file to write")
    if figures is not None and figures.is_file():
        raise ConfigError("--figures", str(figures), "is a file", "give the path of a folder")
    if trace is not None and (texts or prompts):
        given = "--text" if texts else "--prompt"
        raise ConfigError(given, (texts or prompts or [""])[0], "is not read: a trace has its own text", "leave it out")


def _account(network: PreTrainedModel, context_length: int, *, needed: bool) -> Accounting | None:
    """Size and cost; MoE models of transformers are counted as ours. None for those that can't be counted, unless needed."""
    try:
        ours = isinstance(network, MoesaicForCausalLM) or not getattr(network.config, "num_experts_per_tok", None)
        return account(network if ours else convert(network), context_length=context_length)
    except UnsupportedModel as error:
        if needed:
            raise
        errors.print(f"Size and cost are left out: {error}", highlight=False, markup=False)
        return None


def _tokenizer(
    folder: Path | None, network: PreTrainedModel | None, given: Path | None
) -> PreTrainedTokenizerBase | None:
    if network is not None and folder is not None:
        return tokenizer_of(folder, network, given)
    return None if given is None else load_tokenizer(given)


@dataclass(frozen=True)
class _Sources:
    """What a report is made from, as given on the command line."""

    model: Path | None
    texts: list[str] | None
    prompts: list[str] | None
    checkpoints: list[Path] | None
    compare: Path | None
    trace: Path | None
    capacity: float | None
    max_tokens: int
    quiet: bool

    @property
    def text(self) -> str:
        """What was read, for the head of the page."""
        return ", ".join([*(self.texts or []), *map(repr, self.prompts or [])]) or "held out by the training run"


def _report(
    sources: _Sources,
    network: PreTrainedModel | None,
    folder: Path | None,
    names: PreTrainedTokenizerBase | None,
    accounting: Accounting | None,
) -> Report:
    facts = {} if sources.model is None else {"model": str(model_folder(sources.model))}
    statistics, recorder = [], Recorder({}, names, sources.quiet)
    log: RoutingLog
    if sources.trace is not None:
        log = opened(sources.trace, names)
        if network is not None:
            check_model(log, network)
        facts["trace"] = str(sources.trace)
    else:
        assert network is not None, "it was asked for"
        assert folder is not None, "it comes with the model"
        assert names is not None, "it comes with the model"
        recorder = Recorder(_batches(sources, network, folder, names), names, sources.quiet)
        with watch_state(network) as influence:
            log = found = recorder.record(network, str(sources.model))
        if isinstance(network, MoesaicForCausalLM):
            statistics = router_statistics(network, found, influence)
        facts["text"] = sources.text
    if sources.capacity is not None:
        log = apply_capacity(log, CapacityConfig(factor=sources.capacity))
        facts["capacity"] = f"factor {sources.capacity:g}, applied to the picks afterwards"
    for option, path in _others(sources):
        if sources.trace is not None and not is_trace(path):
            raise ConfigError(option, str(path), "is no trace, and there is no text for it to read", "give a trace")
    earlier = checkpoint_logs(recorder, sources.checkpoints, log, folder) if sources.checkpoints else []
    other = sources.compare and Named(str(sources.compare), recorder.log_of(sources.compare, "--compare"))
    return make_report(
        log,
        accounting,
        title=str(sources.model or sources.trace),
        tokenizer=names,
        facts=facts,
        statistics=statistics,
        checkpoints=earlier,
        other=other,
    )


def _others(sources: _Sources) -> list[tuple[str, Path]]:
    compared = [("--compare", sources.compare)] if sources.compare else []
    return [*(("--checkpoints", path) for path in sources.checkpoints or []), *compared]


def _batches(
    sources: _Sources, network: PreTrainedModel, folder: Path, names: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """What models read, by domain: prompts, and texts or, where there is neither, the held-out text of the run."""
    found = dict(prompt_batches(sources.prompts or [], names, network))
    if sources.texts or not sources.prompts:
        length = sequence_length_for(network)
        with batches_of(sources.texts, names, folder, batch_size=8, sequence_length=length) as given:
            found |= read_batches(given, sources.max_tokens)
    return found


def _summary(made: Report, path: Path, figures: Path | None) -> dict[str, Any]:
    numbers = made.to_dict()
    return {
        "tokens": made.subject.num_tokens,
        "max_violation": {layer.layer: float(max_violation(layer.load_N)) for layer in made.subject.layers},
        "routers": [asdict(row) for row in made.subject.statistics],
        "report": str(path),
        "figures": None if figures is None else str(figures),
        "header": numbers["header"],
        "tables": numbers["tables"],
    }
