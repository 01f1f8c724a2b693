"""How float32 factors are multiplied."""

from __future__ import annotations

import torch


def dot_precision(dtype: torch.dtype) -> str:
    """ "tf32" if torch may use it for float32 matrix products, else "ieee"; without effect on 16-bit numbers."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"
