"""Every packed experts class of the installed transformers: our kernels equal its own eager forward and backward."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from moesaic.errors import UnsupportedKernel
from moesaic.layer.kernels import ExpertWeights

N, D, F = 4, 8, 8
MODELS = Path(transformers.__file__).parent / "models"
DECORATED = re.compile(r"^@use_experts_implementation.*\nclass (\w+)", flags=re.MULTILINE)
# Activations that kernels which fuse do not know; `grouped` calls them.
CALLED = {
    "BeamExperts",
    "DeepseekV4Experts",
    "Glm5NextTextExperts",
    "HYV4Experts",
    "Inkling2Experts",
    "Step3p7Experts",
}


def classes() -> list[Any]:
    found = []
    for path in sorted(MODELS.glob("*/modeling_*.py")):
        for name in DECORATED.findall(path.read_text(encoding="utf-8")):
            module = f"transformers.models.{path.parent.name}.{path.stem}"
            found.append(pytest.param(module, name, id=f"{path.parent.name}-{name}"))
    return found


class AnyConfig:
    """Answers whatever a constructor asks of its config with small numbers."""

    _experts_implementation = "eager"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if "act" in name:
            return "silu"
        if "limit" in name:
            return 0.5
        if "alpha" in name or "eps" in name:
            return 1.5
        if "latent" in name:
            return None
        return N if "expert" in name and "size" not in name else D


@pytest.mark.parametrize(("module", "name"), classes())
def test_our_kernels_compute_what_the_class_computes(module: str, name: str) -> None:
    config = AnyConfig()
    experts = getattr(importlib.import_module(module), name)(config)
    if experts.has_post_expert_norm:
        with pytest.raises(UnsupportedKernel, match=name):
            ExpertWeights.of(experts)
        return
    generator = torch.Generator().manual_seed(0)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    x_TD = torch.randn(9, D, generator=generator, requires_grad=True)
    weight_TK = torch.rand(9, 2, generator=generator, requires_grad=True)
    index_TK = torch.rand(9, N, generator=generator).topk(2).indices
    found = []
    for implementation in ("eager", "moesaic"):
        config._experts_implementation = implementation
        y_TD = experts(x_TD, index_TK, weight_TK)
        found.append([y_TD, *torch.autograd.grad(y_TD.square().sum(), [x_TD, weight_TK, *experts.parameters()])])
    for actual, expected in zip(found[1], found[0], strict=True):
        assert (actual - expected).norm() <= 1e-5 * expected.norm()
    assert (ExpertWeights.of(experts).fused is None) == (name in CALLED)
    torch.compiler.reset()  # all classes share one decorated forward
    compiled = torch.compile(experts, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x_TD, index_TK, weight_TK), found[1][0], rtol=1e-4, atol=1e-4)
