"""Sizes of the layers that are measured, and how they are written on the command line."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from moesaic.errors import ConfigError

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}

_LETTERS = {"d": "hidden", "f": "width", "n": "experts", "k": "picks"}
_PART = re.compile(r"([dfnk])=?(\d+)")


@dataclass(frozen=True)
class Shape:
    """An MoE layer with gated experts.

    Attributes:
        hidden: D.
        width: F, the hidden width of one expert.
        experts: N.
        picks: K, experts a token.
    """

    hidden: int
    width: int
    experts: int
    picks: int

    @property
    def name(self) -> str:
        """Such as d1024-f512-n64-k8; `parse` reads it."""
        return f"d{self.hidden}-f{self.width}-n{self.experts}-k{self.picks}"

    @property
    def expert_parameters(self) -> int:
        """Weights of one expert: gate, up and down."""
        return 3 * self.hidden * self.width

    @classmethod
    def parse(cls, text: str) -> Shape:
        """Read `d1024-f512-n64-k8` or `d=1024,f=512,n=64,k=8`.

        Raises:
            ConfigError: if a size is missing, given twice, not a positive number, or K is larger than N.
        """
        sizes: dict[str, int] = {}
        for part in re.split(r"[-,]", text.strip()):
            found = _PART.fullmatch(part)
            if found is None or _LETTERS[found[1]] in sizes or int(found[2]) == 0:
                raise ConfigError("--shape", text, f"has the part {part!r}", _REMEDY)
            sizes[_LETTERS[found[1]]] = int(found[2])
        missing = [letter for letter, name in _LETTERS.items() if name not in sizes]
        if missing:
            raise ConfigError("--shape", text, f"lacks {', '.join(missing)}", _REMEDY)
        if sizes["picks"] > sizes["experts"]:
            raise ConfigError("--shape", text, "picks more experts than there are", "choose k from 1 to n")
        return cls(**sizes)


_REMEDY = "write it as d1024-f512-n64-k8: hidden size, width of an expert, experts, picks"

# A fine-grained layer, a large one, and one like Mixtral's; and one that takes seconds.
PRESETS = tuple(Shape.parse(name) for name in ("d1024-f512-n64-k8", "d2048-f1024-n64-k8", "d768-f2048-n8-k2"))
QUICK_SHAPE = Shape.parse("d512-f256-n16-k4")
