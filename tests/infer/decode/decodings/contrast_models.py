"""Tiny models to decode with self-contrast, and the paper's loop for it, written down plainly."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from tests.infer.decode.overrides.test_models import model_of
from torch import Tensor, nn

import moesaic

GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 8}
FAMILIES = ("mixtral", "qwen3_moe", "qwen2_moe", "olmoe", "deepseek_v2", "deepseek_v3", "gpt_oss", "glm4_moe")


@functools.cache
def model_for(name: str) -> Any:
    """A stock family or "ours", decided enough that the mask of plausible tokens matters; shared, so not to be changed."""
    return sharpened(model_of(name))


def sharpened(model: Any) -> Any:
    """With logits some nats apart: of a flat distribution every token is plausible."""
    with torch.no_grad():
        deviation = model(prompts(1, 40)[0].unsqueeze(0)).logits[0].std(-1).mean()
        head: nn.Module = model.get_output_embeddings()
        head.weight.mul_(4.0 / deviation)
    return model


def prompts(count: int = 24, longest: int = 12) -> list[Tensor]:
    """Random prompts of four lengths."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 50, (longest - 2 * (row % 4),), generator=generator) for row in range(count)]


def padded(rows: Sequence[Tensor]) -> dict[str, Tensor]:
    """Prompts as a batch, padded on the left."""
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(rows):
        ids[row, width - len(prompt) :], mask[row, width - len(prompt) :] = prompt, 1
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def scores(model: Any, ids_BS: Tensor, weak: str, alpha: float, beta: float, strong: Any = ()) -> tuple[Tensor, Tensor]:
    """Contrasted scores and strong logits (B, V) of the next token, without a cache; equations 5 and 6 in float64."""
    with moesaic.override_routing(model, strong):
        strong_BV = model(ids_BS).logits[:, -1].double()
    with moesaic.override_routing(model, weak):
        weak_BV = model(ids_BS).logits[:, -1].double()
    masked_BV = strong_BV < strong_BV.max(-1, keepdim=True).values + math.log(alpha)
    return ((1 + beta) * strong_BV - beta * weak_BV).masked_fill(masked_BV, -torch.inf), strong_BV


def reference(
    model: Any, rows: Sequence[Tensor], weak: str = "rank=2", *, alpha: float = 0.1, beta: float = 0.5, **options: Any
) -> list[list[int]]:
    """New tokens of greedy self-contrast for each prompt; prompts of one length are computed together."""
    new_tokens = options.pop("new_tokens", GREEDY["max_new_tokens"])
    found: dict[int, list[int]] = {}
    for length in {len(prompt) for prompt in rows}:
        places = [place for place, prompt in enumerate(rows) if len(prompt) == length]
        ids_BS = torch.stack([rows[place] for place in places])
        for _ in range(new_tokens):
            next_B = scores(model, ids_BS, weak, alpha, beta, **options)[0].argmax(-1)
            ids_BS = torch.cat([ids_BS, next_B.unsqueeze(1)], 1)
        found.update(zip(places, ids_BS[:, length:].tolist(), strict=True))
    return [found[place] for place in range(len(rows))]


def decoded(model: Any, rows: Sequence[Tensor], decoding: Any, **options: Any) -> list[list[int]]:
    """New tokens of a padded batch."""
    batch = padded(rows)
    found = model.generate(**batch, custom_generate=decoding, **{**GREEDY, **options})
    return found[:, batch["input_ids"].shape[1] :].tolist()
