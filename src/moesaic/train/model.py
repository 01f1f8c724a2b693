"""The model that a run trains, MoE or dense."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from moesaic.data import DataConfig, TrainBPE, TrainingObjective
from moesaic.data.objective.check import check_stages
from moesaic.errors import ConfigError
from moesaic.hf import MoesaicForCausalLM, build, read_backbone
from moesaic.hf.families import family_of
from moesaic.hf.router_presets import presets_of
from moesaic.layer import HashConfig, MoESpec
from moesaic.layer.routers.hash import read_frequencies
from moesaic.train.config import TrainConfig
from moesaic.train.load import check_local_path, load_model
from moesaic.train.run import RunConfig

_SMALLEST_TRAINED_VOCABULARY = 258  # 256 bytes and 2 special tokens


def select_device(name: str) -> torch.device:
    """The torch device for `train.device`.

    Raises:
        ConfigError: if it is not a device or this machine lacks it.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if name == "auto":
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError("train.device", name, "is not a device of torch", "use auto, cpu, cuda or mps") from None
    usable = device.type == "cpu" or (
        accelerator is not None
        and device.type == accelerator.type
        and (device.index or 0) < torch.accelerator.device_count()
    )
    if not usable:
        raise ConfigError("train.device", name, "is not on this machine", f"use auto or {accelerator or 'cpu'}")
    return device


def check_architecture(run: RunConfig) -> None:
    """Check what can be known of the model before text is tokenised, which may take long.

    Raises:
        ConfigError: if a field of `backbone` or `moe` is invalid, the layers look at what `data.domains_are` does not
            give, a stage of the objective is beyond the run, or `initial_model` does not exist.
        UnsupportedModel: if the backbone can't take MoE layers, or has none of its own and is to be traced.
    """
    check_stages(run.data.objective, run.train.steps)
    if run.initial_model is not None:
        check_local_path(run.initial_model)
    elif run.backbone is not None:
        config = read_backbone(run.backbone)
        if run.moe is not None:
            family_of(config)
            run.moe.layers.indices(config.num_hidden_layers)
            check_labels(run.moe, run.data)
            _check_that_it_builds(run, run.moe)
        elif run.train.trace is not None:
            presets_of(config)


def check_labels(spec: MoESpec, data: DataConfig) -> None:
    """Refuse layers that look at modalities or tasks which batches do not name.

    Raises:
        ConfigError: naming the field that maps domains to them.
    """
    missing = sorted(spec.needs - {"token_ids", data.domains_are})
    if missing:
        looking = f"router {spec.router.type}" if missing[0] in spec.router.needs else "a balance loss"
        other = f"; it can't give a {data.domains_are} too" if data.domains_are in spec.needs else ""
        raise ConfigError(
            "data.domains_are",
            data.domains_are,
            f"gives the model no {missing[0]}, at which {looking} looks",
            f"set it to {missing[0]}, which the domain of the text then is{other}",
        )


def _check_that_it_builds(run: RunConfig, spec: MoESpec) -> None:
    """Build without weights: some fields only show there that they do not fit."""
    backbone = run.backbone
    assert backbone is not None
    if isinstance(backbone, Mapping) and "vocab_size" not in backbone:
        # The tokenizer decides it later; the smallest that it may find fits every router by token id that will do.
        smallest, known = 1, getattr(spec.router, "vocabulary_size", _SMALLEST_TRAINED_VOCABULARY)
        if isinstance(run.data.tokenizer, TrainBPE):
            fits = known >= _SMALLEST_TRAINED_VOCABULARY
            smallest = _SMALLEST_TRAINED_VOCABULARY if fits else run.data.tokenizer.vocab_size
        special = [value for name, value in backbone.items() if name.endswith("_token_id") and isinstance(value, int)]
        backbone = {**backbone, "vocab_size": max([smallest, *(value + 1 for value in special)])}
    with torch.device("meta"):
        build(backbone, spec)
    if isinstance(spec.router, HashConfig) and spec.router.frequencies is not None:
        read_frequencies(spec.router)


def build_model(run: RunConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The model at step 0, float32, on the CPU. Random weights depend on the seed set before.

    Raises:
        ConfigError: if a field is invalid or the vocabulary is smaller than the tokenizer's.
        UnsupportedModel: if the backbone can't take MoE layers.
        CheckpointError: if `initial_model` can't be loaded.
    """
    if run.initial_model is not None:
        model = load_model(run.initial_model)
        check_initial_model(model, run, tokenizer)
        return model
    config = backbone_config(run, tokenizer)
    if run.moe is not None:
        return build(config, run.moe).float()
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def check_initial_model(model: PreTrainedModel, run: RunConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that a loaded model can be trained on the run's data.

    Raises:
        ConfigError: if its vocabulary is smaller than the tokenizer's, or its layers look at what the data does not give.
    """
    _check_vocabulary(model.config.get_text_config(), run, tokenizer)
    if isinstance(model, MoesaicForCausalLM):
        check_labels(model.config.spec, run.data)


def backbone_config(run: RunConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    """The stock config of `run.backbone`, fitted to the tokenizer."""
    assert run.backbone is not None, "RunConfig checks this"
    backbone = run.backbone
    if isinstance(backbone, Mapping):
        fitted = {
            "vocab_size": objective_of(run, tokenizer).vocabulary,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
        backbone = {**fitted, **backbone}
    config = read_backbone(backbone)
    _check_vocabulary(config, run, tokenizer)
    return config


def prepare_for_training(model: PreTrainedModel, config: TrainConfig, device: torch.device) -> None:
    """Move the model to its device and switch on what `config` asks for, in place."""
    model.to(device)  # pyright: ignore[reportArgumentType]
    if config.gradient_checkpointing:
        # Recomputation without reentry is what torch recommends; it needs no input that requires a gradient.
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if config.compile:
        model.compile()
    model.train()


def objective_of(run: RunConfig, tokenizer: PreTrainedTokenizerBase) -> TrainingObjective:
    """What the batches of a run ask for.

    Raises:
        ConfigError: if the tokenizer has no ids for what the objective needs.
    """
    return TrainingObjective(run.data.objective, tokenizer, run.data.sequence_length, run.data.seed)


def _check_vocabulary(config: PreTrainedConfig, run: RunConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    needed = objective_of(run, tokenizer).vocabulary
    if config.vocab_size < needed and needed > len(tokenizer):
        raise ConfigError(
            "backbone.vocab_size",
            config.vocab_size,
            f"is smaller than the {needed} ids of text and data.objective",
            "leave it out, or move reserved_from of the objective",
        )
    if config.vocab_size < len(tokenizer):
        raise ConfigError(
            "backbone.vocab_size",
            config.vocab_size,
            f"is smaller than the tokenizer's vocabulary ({len(tokenizer)})",
            "leave it out, or lower data.tokenizer.vocab_size",
        )
