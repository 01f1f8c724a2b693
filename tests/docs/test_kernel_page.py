"""docs/kernels.md has a row for every kernel that a config may name, in the order in which models prefer them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

from moesaic.hf.expert_kernels import model_kernels
from moesaic.layer.kernels import KERNELS, KernelName

PAGE = (Path(__file__).parents[2] / "docs" / "kernels.md").read_text(encoding="utf-8")


def test_every_kernel_has_a_row() -> None:
    rows = re.findall(r"^\| `(\w+)` \|", PAGE, flags=re.MULTILINE)
    ours, all_kernels = ([kernel.name for kernel in kernels] for kernels in (KERNELS, model_kernels(may_skip=True)))
    assert rows == ours + [name for name in all_kernels if name not in ours]
    assert {"auto", *rows} == set(get_args(KernelName))
