"""Moving a stock model's weights into ours, and back: everything outside the MoE blocks goes over by name."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from moesaic.hf.configuration import MoesaicConfig
from moesaic.hf.families import family_of
from moesaic.hf.model import MoesaicForCausalLM
from moesaic.layer import MoESpec

# Maps the block of one side to the state dict of the block of the other side.
BlockTensors = Callable[[nn.Module], dict[str, Tensor]]


def decoder_layers(base: nn.Module, model_type_config) -> nn.ModuleList:
    """The decoder layers of a stock base model or of our backbone."""
    return getattr(base, family_of(model_type_config).layers)


def transplant(source: PreTrainedModel, spec: MoESpec, block_tensors: BlockTensors) -> MoesaicForCausalLM:
    """Our model with the weights of a stock causal language model.

    Tensors are copied, so training one model leaves the other as it was. Dtype, device, training mode, attention
    implementation and generation config are taken over.

    Args:
        source: stock `...ForCausalLM`.
        spec: the MoE layers.
        block_tensors: maps the stock feed-forward module or MoE block of a layer to the state dict of our block.
    """
    config = MoesaicConfig(backbone=copy.deepcopy(source.config), moe=spec.to_dict(), dtype=source.dtype)
    with torch.device("meta"):
        model = MoesaicForCausalLM(config)
    paths = _block_paths(model, source.config)
    _move(source, source.base_model, model, model.model.backbone, dict(zip(paths, paths, strict=True)), block_tensors)
    return model


def respecify(model: MoesaicForCausalLM, spec: MoESpec, block_tensors: BlockTensors) -> MoesaicForCausalLM:
    """A copy of our model with other MoE blocks in the same layers.

    Args:
        model: left as it is; tensors are copied.
        spec: of the new blocks, with the placement of the old one.
        block_tensors: maps a block of `model` to the state dict of the new block.
    """
    config = copy.deepcopy(model.config)
    config.moe = spec.to_dict()
    with torch.device("meta"):
        target = MoesaicForCausalLM(config)
    paths = _block_paths(model, model.config.get_text_config())
    blocks = dict(zip(paths, paths, strict=True))
    _move(model, model.model.backbone, target, target.model.backbone, blocks, block_tensors)
    return target


def transplant_back(
    model: MoesaicForCausalLM, config: PreTrainedConfig, block_tensors: BlockTensors
) -> PreTrainedModel:
    """A stock causal language model with the weights of ours; the inverse of `transplant`.

    Args:
        model: whose backbone has the same parts outside the MoE blocks as the stock model.
        config: stock config, which places MoE blocks in the layers where `model` has them.
        block_tensors: maps our block to the state dict of the stock block.
    """
    backbone = model.model.backbone
    config.dtype = model.dtype
    with torch.device("meta"):
        stock = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    paths = dict(zip(_block_paths(model, backbone.config), _block_paths(model, config), strict=True))
    _move(model, backbone, stock, stock.base_model, paths, block_tensors)
    return stock


def _block_paths(model: MoesaicForCausalLM, config: PreTrainedConfig) -> list[str]:
    """Where a base model with `config` keeps the feed-forward modules or MoE blocks of our MoE layers."""
    family = family_of(config)
    return [f"{family.layers}.{index}.{family.feed_forward}" for index in model.moe_blocks()]


def _move(
    source: PreTrainedModel,
    source_base: nn.Module,
    target: PreTrainedModel,
    target_base: nn.Module,
    paths: Mapping[str, str],
    block_tensors: BlockTensors,
) -> None:
    """Fill `target`, made on the meta device, from `source`; `paths` leads from each block to its counterpart."""
    replaced = tuple(f"{path}." for path in paths)
    named = [*source_base.named_parameters(), *source_base.named_buffers()]
    tensors = {name: tensor for name, tensor in named if not name.startswith(replaced)}
    for here, there in paths.items():
        block = block_tensors(source_base.get_submodule(here))
        tensors |= {f"{there}.{name}": tensor for name, tensor in block.items()}
    _assign(target_base, tensors)
    _assign(
        cast(nn.Module, target.get_output_embeddings()),
        dict(cast(nn.Module, source.get_output_embeddings()).named_parameters()),
    )
    target.tie_weights()
    target.set_attn_implementation(cast(str, cast(PreTrainedConfig, source_base.config)._attn_implementation))
    target.generation_config = copy.deepcopy(source.generation_config)
    target.train(source.training)


def _assign(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put copies of tensors in the place of all parameters and buffers of a module made on the meta device."""
    expected = dict([*module.named_parameters(), *module.named_buffers()])
    missing, unexpected = expected.keys() - tensors.keys(), tensors.keys() - expected.keys()
    if missing or unexpected:
        raise RuntimeError(f"weights do not fit: missing {sorted(missing)}, unexpected {sorted(unexpected)}")
    for name, tensor in tensors.items():
        if expected[name].shape != tensor.shape:
            raise RuntimeError(f"{name}: shape {tuple(tensor.shape)} does not fit {tuple(expected[name].shape)}")
        path, _, leaf = name.rpartition(".")
        owner, copied = module.get_submodule(path), tensor.detach().clone()
        if leaf in owner._parameters:
            owner._parameters[leaf] = nn.Parameter(copied, requires_grad=expected[name].requires_grad)
        else:
            owner._buffers[leaf] = copied
