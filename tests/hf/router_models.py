"""A tiny model for every row of the routers' matrix, and what its forward takes."""

from __future__ import annotations

import torch
from tests.hf.tiny import backbone_config, token_ids
from tests.layer.router_rows import MODALITIES, ROUTERS, TASKS, N
from torch import Tensor

import moesaic
from moesaic import MoesaicForCausalLM, MoESpec

VOCABULARY = 11  # that of the rows whose routers hold a table of tokens


def spec_of(name: str) -> MoESpec:
    return MoESpec.from_dict(
        {
            "experts": {"num_experts": N, "intermediate_size": 12},
            "router": ROUTERS[name].values,
            "layers": {"only": [0, 2]},  # a dense layer between
            "balance": [{"type": "load_balancing", "coefficient": 0.1}],
        },
        where="moe",
    )


def router_model(name: str) -> MoesaicForCausalLM:
    """With weights large enough that routing and next tokens are decided."""
    torch.manual_seed(0)
    model = moesaic.build(backbone_config("llama", vocab_size=VOCABULARY), spec_of(name))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "norm" not in parameter_name:
                parameter.normal_(std=0.2, generator=generator)
    return model


def inputs(batch: int = 2, length: int = 9, seed: int = 1) -> dict[str, Tensor]:
    ids = token_ids(batch, length, seed) % (VOCABULARY - 3) + 3
    return {"input_ids": ids}


def extras(model: MoesaicForCausalLM, ids: Tensor) -> dict[str, Tensor]:
    """What the model must be told of these tokens besides their ids."""
    needs = model.config.spec.needs
    found = {}
    if "modality" in needs:
        found["modality_ids"] = ids % MODALITIES
    if "task" in needs:
        found["task_ids"] = torch.arange(ids.shape[0]) % TASKS
    return found
