"""`moesaic generate`: text from a model, token by token."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import typer
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from moesaic.cli.console import Json, emit_json, errors
from moesaic.cli.decodings import HELP, decoding_of, fast_decoding_of
from moesaic.cli.models import load, positions_of, tokenizer_of
from moesaic.cli.overrides import Override, routing_of
from moesaic.cli.tracing import TracePath, trace_report, traced
from moesaic.errors import ConfigError
from moesaic.hf import MoesaicForCausalLM
from moesaic.infer.decode import DecodingSpec, count_positions


class _Stream(TextStreamer):
    """Prints words as they are complete, without the prompt."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)  # type: ignore[arg-type]

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        sys.stdout.write(text + ("\n" if stream_end else ""))
        sys.stdout.flush()


def command(
    model: Annotated[Path, typer.Argument(help="Folder of a model or of a training run.")],
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="Text to continue; - reads it from stdin.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Stop after this many tokens.")] = 128,
    decode: Annotated[str | None, typer.Option(metavar="TEXT", help=HELP)] = None,
    temperature: Annotated[
        float | None,
        typer.Option(min=0.0, help="0 takes the most likely token.", show_default="0.8, or what --decode says"),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            max=1.0,
            help="Sample from the smallest set of this mass.",
            show_default="0.95, or what --decode says",
        ),
    ] = None,
    num_beams: Annotated[
        int | None, typer.Option(min=1, help="Beam search with this many beams (not streamed).", show_default="1")
    ] = None,
    domain: Annotated[
        int | None,
        typer.Option(min=0, help="Number of the text's task or modality, for routers that look at it (docs: Data)."),
    ] = None,
    override: Override = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of sampling.")] = 0,
    tokenizer: Annotated[Path | None, typer.Option(help="Folder of the tokenizer, if it is not the model's.")] = None,
    trace: TracePath = None,
    json: Json = False,
) -> None:
    """Continue a text with a model, printing tokens as they come.

    Example: moesaic generate runs/demo/moe --prompt "def read_file(path):" --temperature 0.5
    """
    spec = decoding_of(decode, temperature=temperature, top_p=top_p, num_beams=num_beams)
    network, folder = load(model)
    tokens = tokenizer_of(folder, network, tokenizer)
    text = sys.stdin.read() if prompt == "-" else prompt
    # Nothing to continue means the start of a document.
    inputs: Any = tokens(text or str(tokens.eos_token), return_tensors="pt", add_special_tokens=bool(text))
    labels = _labels(network, inputs["input_ids"], domain)
    _check_length(network, inputs["input_ids"].shape[1], max_new_tokens)
    companions = () if spec is None else spec.companions
    generate, beams = _generation(network, spec, temperature, top_p, num_beams)
    torch.manual_seed(seed)
    begun = time.perf_counter()
    with (
        routing_of(network, override),
        fast_decoding_of(network, *companions),
        traced(trace, 1.0, network, tokens) as recorded,
        count_positions(network, *companions) as positions,
    ):
        output: Any = generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=max_new_tokens,
            streamer=None if json or beams > 1 else _Stream(tokens),
            pad_token_id=tokens.pad_token_id if tokens.pad_token_id is not None else tokens.eos_token_id,
            **labels,
        )
    seconds = time.perf_counter() - begun
    new = output[0, inputs["input_ids"].shape[1] :]
    continuation = str(tokens.decode(new, skip_special_tokens=True))
    if json:
        rate = round(len(new) / seconds, 1)
        emit_json(
            {
                "prompt": text,
                "text": continuation,
                "tokens": len(new),
                "tokens_per_second": rate,
                **({} if spec is None else {"decoding": spec.label, "forward_positions": positions.count}),
                **trace_report(recorded),
            }
        )
    else:
        if beams > 1:
            sys.stdout.write(continuation + "\n")
        errors.print(f"{len(new)} tokens, {len(new) / seconds:.1f} tokens/s", style="dim")
        if recorded is not None:
            errors.print(f"Routing of {recorded.num_tokens:,} tokens: {recorded.path}", style="dim")


def _generation(
    model: PreTrainedModel,
    spec: DecodingSpec | None,
    temperature: float | None,
    top_p: float | None,
    num_beams: int | None,
) -> tuple[Callable[..., Any], int]:
    """What is called with the inputs, and the number of beams."""
    if spec is not None:
        return functools.partial(spec.generate, model), spec.num_beams
    temperature, top_p = (0.8 if temperature is None else temperature), (0.95 if top_p is None else top_p)
    beams = num_beams or 1
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature else {"do_sample": False}
    return functools.partial(cast(Any, model).generate, num_beams=beams, **sampling), beams


def _labels(model: PreTrainedModel, ids_BS: Tensor, domain: int | None) -> dict[str, Tensor]:
    """The inputs that say which task or modality the text is, for models that look at it."""
    needs = model.config.spec.router.needs - {"token_ids"} if isinstance(model, MoesaicForCausalLM) else frozenset()
    if domain is None and needs:
        raise ConfigError(
            "--domain",
            None,
            f"is missing: the router of this model looks at the {min(needs)} of the text",
            "give its number; a run numbers its domains in the order in which they are read",
        )
    if domain is not None and not needs:
        raise ConfigError("--domain", domain, "means nothing to this model", "leave it out")
    labels = {"task": torch.full(ids_BS.shape[:1], domain or 0), "modality": torch.full_like(ids_BS, domain or 0)}
    return {f"{need}_ids": labels[need] for need in needs}


def _check_length(model: PreTrainedModel, prompt_length: int, max_new_tokens: int) -> None:
    positions = positions_of(model)
    if positions is not None and prompt_length + max_new_tokens > positions:
        raise ConfigError(
            "--max-new-tokens",
            max_new_tokens,
            f"after {prompt_length} tokens of prompt goes past the model's {positions} positions",
            f"choose at most {positions - prompt_length}" if prompt_length < positions else "shorten the prompt",
        )
