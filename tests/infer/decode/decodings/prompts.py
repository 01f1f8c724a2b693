"""Prompts of several lengths, alone and as one padded batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

NEW_TOKENS = 8
GREEDY: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None}
Reference = Callable[[Tensor], Tensor]


def same_length() -> list[Tensor]:
    """21 prompts (3, S) of 7 lengths, in a vocabulary of 64."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, 64, (3, length), generator=generator) for length in (2, 3, 4, 6, 7, 9, 12)]


def padded() -> tuple[Tensor, Tensor]:
    """The same (21, 12), padded on the left, and their mask."""
    groups = same_length()
    width = max(group.shape[1] for group in groups)
    ids = torch.cat([functional.pad(group, (width - group.shape[1], 0)) for group in groups])
    mask = torch.cat([functional.pad(torch.ones_like(group), (width - group.shape[1], 0)) for group in groups])
    return ids, mask


@torch.no_grad()
def continued(choose: Reference, new_tokens: int = NEW_TOKENS) -> list[list[int]]:
    """Tokens that follow each prompt, chosen one after the other without padding and caches.

    Args:
        choose: the next tokens (B,) of sequences (B, S).
    """
    found: list[list[int]] = []
    for ids in same_length():
        start = ids.shape[1]
        for _ in range(new_tokens):
            ids = torch.cat([ids, choose(ids)[:, None]], 1)
        found += ids[:, start:].tolist()
    return found


@torch.no_grad()
def generated(model: Any, decoding: Any, **options: Any) -> list[list[int]]:
    """Tokens that follow each prompt, from the padded batch."""
    ids, mask = padded()
    out = model.generate(ids, attention_mask=mask, custom_generate=decoding, **{**GREEDY, **options})
    return out[:, ids.shape[1] :].tolist()
