"""Models that a user brings: an arm of an experiment that is measured and not trained."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moesaic.configuration import Config
from moesaic.data import load_tokenizer
from moesaic.errors import CheckpointError, ConfigError
from moesaic.hf import MoesaicForCausalLM
from moesaic.trace import account
from moesaic.trace.facts import facts_of
from moesaic.train import load_model
from moesaic.train.load import check_local_path
from moesaic.train.model import select_device

_DTYPES = {
    "auto": "auto",
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


class GivenModel(Config):
    """The `checkpoint` section of an arm, in place of what it would train.

    Attributes:
        path: folder of a causal language model and its tokenizer, or a hub name; there is no default.
        dtype: of the weights; "auto" takes that of the checkpoint.
        device: "auto" takes the accelerator if there is one; or "cpu", "cuda", "cuda:1", "mps".
        split: spread the layers of the model over all accelerators and, if they don't fit, the CPU, as `device_map="auto"` of
            transformers does (needs accelerate).
    """

    path: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = "auto"
    split: bool = False

    def check(self) -> None:
        """Check what can be known before the weights are read.

        Raises:
            ConfigError: if there is no path, or nothing at it, or this machine lacks the device.
        """
        if self.path is None:
            raise ConfigError(
                "checkpoint.path", None, "is missing", "give the folder of a model: --set checkpoint.path=FOLDER"
            )
        try:
            check_local_path(self.path)
        except CheckpointError:
            raise ConfigError("checkpoint.path", self.path, "is not a folder", "give that of a saved model") from None
        select_device(self.device)

    def load(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The model, in evaluation mode, and its tokenizer.

        Raises:
            CheckpointError: if there is no model, a file is missing or cut short, or weights do not fit the config.
            DataError: if there is no tokenizer, or it has no end-of-text token.
        """
        self.check()
        assert self.path is not None
        dtype: Any = _DTYPES[self.dtype]
        model = load_model(self.path, dtype=dtype, device_map="auto" if self.split else None)
        if not self.split:
            model = model.to(select_device(self.device))  # pyright: ignore[reportArgumentType]
        tokenizer = load_tokenizer(self.path)
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token  # padding is masked, so any token will do
        return model.eval(), tokenizer


def parameters_of(model: PreTrainedModel) -> tuple[int, int]:
    """Parameters stored, and in use for a token, of a MoE model of ours or of transformers.

    Of the experts of a layer a token uses as many as it picks; what they share stands beside them.
    """
    if isinstance(model, MoesaicForCausalLM):
        counted = account(model)
        return counted.total, counted.active
    routed = facts_of(model).layers
    total = active = 0
    for name, parameter in model.named_parameters():
        total += parameter.numel()
        found = re.search(r"\.(\d+)\..*\bexperts\b", name)
        layer = routed.get(int(found[1])) if found else None
        active += parameter.numel() if layer is None else parameter.numel() * layer.top_k // layer.num_experts
    return total, active


@dataclass(frozen=True)
class Given:
    """A model that a user brought, for measurements.

    Attributes:
        arm: name of the arm.
        seed: of whatever is drawn.
        model: in evaluation mode.
        tokenizer: its own.
        options: of the measurements, as the size's file has them.
        folder: for what long measurements keep, so that they go on where they were interrupted; None keeps nothing.
    """

    arm: str
    seed: int
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    options: Mapping[str, Any]
    folder: Path | None = None
