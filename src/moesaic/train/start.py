"""The model with which a run starts, on one device or spread over processes."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import cast

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from moesaic.dist import Layout, Meshes, build_sharded
from moesaic.dist.checkpoint import load_weights
from moesaic.dist.process import Process
from moesaic.train.load import load_model, open_folder
from moesaic.train.model import build_model, check_initial_model, prepare_for_training
from moesaic.train.ranks import ManyProcesses, OneProcess, Ranks
from moesaic.train.rng import seed_all
from moesaic.train.run import RunConfig


def start_model(
    run: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
    checkpoint: Path | None,
    process: Process,
    layout: Layout | None,
    device: torch.device,
) -> tuple[PreTrainedModel, Ranks]:
    """The model of a run on its device, prepared for training, and the processes that train it.

    Over processes none holds all of it at any time: each draws or reads its part.

    Args:
        run: what to train; its seed decides random weights.
        tokenizer: of its data.
        checkpoint: to go on from, or None.
        process: this one.
        layout: what `check_parallel` returned.
        device: of this process.

    Raises:
        ConfigError: if a field is invalid.
        UnsupportedModel: if the model can't be built, or be spread.
        CheckpointError: if a model can't be loaded.
    """
    seed_all(run.train.seed)
    if layout is None:
        model = build_model(run, tokenizer) if checkpoint is None else load_model(checkpoint)
        prepare_for_training(model, run.train, device)
        return model, OneProcess(model)
    meshes = Meshes.of(layout, device.type)
    param_dtype = torch.bfloat16 if run.train.precision == "bf16" else None
    origin = checkpoint or run.initial_model
    config, folder = (None, None) if origin is None else open_folder(origin)
    if config is None:
        build = functools.partial(build_model, run, tokenizer)
    else:
        build = functools.partial(AutoModelForCausalLM.from_config, config, dtype=torch.float32)
    seed = run.train.seed if folder is None else None
    sharded = build_sharded(build, meshes, run.parallel, device=device, seed=seed, param_dtype=param_dtype)
    model = cast(PreTrainedModel, sharded.model)
    if folder is not None:
        load_weights(model, folder, process.rank)
        check_initial_model(model, run, tokenizer)
    prepare_for_training(model, run.train, device)
    return model, ManyProcesses(process, sharded, device)
