"""A whole model to generate with: a stock Qwen3-MoE with random weights, and a dense one of equal active size."""

from __future__ import annotations

import math
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.generation.streamers import BaseStreamer
from transformers.initialization import no_init_weights

from moesaic.bench.cases import Cell
from moesaic.bench.device import synchronise
from moesaic.bench.shapes import Shape

# The last tokens of a prompt come one by one when models are checked, since decoding may take other paths.
SINGLE_TOKENS = 4


@dataclass(frozen=True)
class ModelSize:
    """What a model has besides the shape of its layers.

    Attributes:
        layers: how many.
        vocabulary: tokens.
        new_tokens: tokens that are generated in a sample.
    """

    layers: int = 8
    vocabulary: int = 8192
    new_tokens: int = 32


@dataclass(frozen=True)
class Generated:
    """What greedy decoding gave, and how long it took.

    Attributes:
        tokens: new ones.
        first: seconds until the first was there.
        rest: seconds for all others.
    """

    tokens: list[int]
    first: float
    rest: float

    @property
    def seconds_a_token(self) -> float:
        """Of decoding alone."""
        return self.rest / (len(self.tokens) - 1)


class Models:
    """Keeps the model of the last shape, type and device, and a folder for what is made from it.

    Args:
        size: layers, vocabulary and new tokens.
        seed: of weights and prompts.
    """

    def __init__(self, size: ModelSize, seed: int) -> None:
        self.size, self._seed = size, seed
        self._of: tuple[Shape, torch.dtype, str] | None = None
        self._model: BenchModel | None = None

    def clear(self) -> None:
        """Let go of the model and its folder."""
        if self._model is not None:
            self._model.close()
        self._of, self._model = None, None

    def of(self, cell: Cell) -> BenchModel:
        """The model of a cell; the same weights for the same seed."""
        of = (cell.shape, cell.torch_dtype, cell.device)
        if self._model is None or of != self._of:
            self.clear()
            self._of, self._model = of, BenchModel(cell, self.size, self._seed)
        return self._model


class BenchModel:
    """A model, and what contenders share about it.

    Args:
        cell: its shape, type and device.
        size: layers, vocabulary and new tokens.
        seed: of weights and prompts.

    Attributes:
        stock: the Qwen3-MoE.
        folder: for files made from it; removed by `close`.
    """

    def __init__(self, cell: Cell, size: ModelSize, seed: int) -> None:
        self.size, self._seed = size, seed
        self.stock = _random(Qwen3MoeForCausalLM, moe_config(cell.shape, size), cell, seed)
        self._dense: PreTrainedModel | None = None
        self._temporary = tempfile.TemporaryDirectory(prefix="moesaic-bench-")
        self.folder = Path(self._temporary.name)

    def dense(self, cell: Cell) -> PreTrainedModel:
        """The dense model of equal active size."""
        dense = self._dense or _random(Qwen3ForCausalLM, dense_config(cell.shape, self.size), cell, self._seed)
        self._dense = dense
        return dense

    def prompt(self, cell: Cell) -> list[int]:
        """Random tokens, as many as the cell says."""
        generator = torch.Generator().manual_seed(self._seed)
        return torch.randint(self.size.vocabulary, (cell.tokens,), generator=generator).tolist()

    def close(self) -> None:
        """Remove the folder."""
        self._temporary.cleanup()


def moe_config(shape: Shape, size: ModelSize) -> Qwen3MoeConfig:
    """A Qwen3-MoE whose heads are 64 wide, with four query heads for a key head where that divides."""
    return Qwen3MoeConfig(
        **_common(shape, size),
        moe_intermediate_size=shape.width,
        num_experts=shape.experts,
        num_experts_per_tok=shape.picks,
        norm_topk_prob=True,
    )


def dense_config(shape: Shape, size: ModelSize) -> Qwen3Config:
    """The same with dense layers as wide as the picked experts together."""
    return Qwen3Config(**{**_common(shape, size), "intermediate_size": shape.picks * shape.width})


def _common(shape: Shape, size: ModelSize) -> dict[str, Any]:
    heads = max(1, shape.hidden // 64)
    return {
        "vocab_size": size.vocabulary,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.width,
        "num_hidden_layers": size.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 4 if heads % 4 == 0 else heads,
        "head_dim": 64,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
    }


def _random(kind: type[Any], config: Any, cell: Cell, seed: int) -> Any:
    """Matrices of variance 1 over their inputs, embeddings of variance 1, norms of ones.

    Uniform, since that is much faster to draw than normal numbers.
    """
    with no_init_weights():
        model = kind._from_config(config, dtype=cell.torch_dtype).to(cell.device).eval().requires_grad_(False)
    generator = torch.Generator(cell.device).manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.fill_(1.0)
            continue
        bound = math.sqrt(3 / (1 if "embed" in name else parameter.shape[-1]))
        parameter.uniform_(-bound, bound, generator=generator)
    return model


class _Clock(BaseStreamer):
    """Notes when each token comes; the first thing that comes is the prompt."""

    def __init__(self, device: str) -> None:
        self._device = device
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        synchronise(self._device)
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def generate(model: PreTrainedModel, prompt: list[int], new_tokens: int) -> Generated:
    """Greedy tokens by transformers' `generate`, and when they came."""
    device = str(model.device)
    ids = torch.tensor([prompt], device=device)
    clock = _Clock(device)
    config = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, pad_token_id=0, eos_token_id=None)
    started = time.perf_counter()
    output = model.generate(  # type: ignore[operator]
        input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config, streamer=clock
    )
    first, last = clock.times[1], clock.times[-1]
    return Generated(output[0, len(prompt) :].tolist(), first - started, last - first)


def decoded_logits(model: PreTrainedModel, prompt: list[int], single: int) -> Tensor:
    """Logits after the prompt in float32, its last `single` tokens given one by one over a cache."""
    ids = torch.tensor([prompt], device=model.device)
    head = max(1, len(prompt) - single)
    with torch.no_grad():
        output = model(input_ids=ids[:, :head], use_cache=True)
        for position in range(head, len(prompt)):
            output = model(
                input_ids=ids[:, position : position + 1], past_key_values=output.past_key_values, use_cache=True
            )
    return output.logits[0, -1].float()
