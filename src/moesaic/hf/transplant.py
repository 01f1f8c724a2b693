"""Moving a stock model's weights into ours, and back: everything outside the MoE blocks goes over by name."""

from __future__ import annotations

import copy
from collections.abc import Callable

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
    family = family_of(source.config)
    config = MoesaicConfig(backbone=copy.deepcopy(source.config), moe=spec.to_dict(), dtype=source.dtype)
    with torch.device("meta"):
        model = MoesaicForCausalLM(config)
    backbone, stock = model.model.backbone, source.base_model
    replaced = {f"{family.layers}.{index}.{family.feed_forward}." for index in model.moe_blocks()}

    def kept(name: str) -> bool:
        return not any(name.startswith(prefix) for prefix in replaced)

    tensors = {name: tensor.detach().clone() for name, tensor in stock.named_parameters() if kept(name)}
    buffers = {name: tensor.detach().clone() for name, tensor in stock.named_buffers() if kept(name)}
    for index in model.moe_blocks():
        path = f"{family.layers}.{index}.{family.feed_forward}"
        block = block_tensors(stock.get_submodule(path))
        tensors |= {f"{path}.{name}": tensor.detach().clone() for name, tensor in block.items()}
    _assign(backbone, tensors | buffers)
    head = source.get_output_embeddings()
    _assign(model.lm_head, {name: tensor.detach().clone() for name, tensor in head.named_parameters()})
    model.tie_weights()
    model.set_attn_implementation(source.config._attn_implementation)
    model.generation_config = copy.deepcopy(source.generation_config)
    return model.train(source.training)


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
    ours, theirs = family_of(backbone.config), family_of(config)
    config.dtype = model.dtype
    with torch.device("meta"):
        stock = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    replaced = {f"{ours.layers}.{index}.{ours.feed_forward}." for index in model.moe_blocks()}

    def kept(name: str) -> bool:
        return not any(name.startswith(prefix) for prefix in replaced)

    named = [*backbone.named_parameters(), *backbone.named_buffers()]
    tensors = {name: tensor.detach().clone() for name, tensor in named if kept(name)}
    for index, block in model.moe_blocks().items():
        path = f"{theirs.layers}.{index}.{theirs.feed_forward}"
        tensors |= {f"{path}.{name}": tensor.detach().clone() for name, tensor in block_tensors(block).items()}
    _assign(stock.base_model, tensors)
    head = stock.get_output_embeddings()
    _assign(head, {name: tensor.detach().clone() for name, tensor in model.lm_head.named_parameters()})
    stock.tie_weights()
    stock.set_attn_implementation(backbone.config._attn_implementation)
    stock.generation_config = copy.deepcopy(model.generation_config)
    return stock.train(model.training)


def _assign(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Put tensors in the place of all parameters and buffers of a module made on the meta device."""
    expected = {name: value for name, value in [*module.named_parameters(), *module.named_buffers()]}
    missing, unexpected = expected.keys() - tensors.keys(), tensors.keys() - expected.keys()
    if missing or unexpected:
        raise RuntimeError(f"weights do not fit: missing {sorted(missing)}, unexpected {sorted(unexpected)}")
    for name, tensor in tensors.items():
        if expected[name].shape != tensor.shape:
            raise RuntimeError(f"{name}: shape {tuple(tensor.shape)} does not fit {tuple(expected[name].shape)}")
        path, _, leaf = name.rpartition(".")
        owner = module.get_submodule(path)
        if leaf in owner._parameters:
            owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=expected[name].requires_grad)
        else:
            owner._buffers[leaf] = tensor
