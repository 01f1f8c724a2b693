"""Spreading a model over processes, in place: expert parallelism and FSDP2."""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

from moesaic.dist.config import ParallelConfig
from moesaic.dist.embedding import partition_embedding
from moesaic.dist.exchange import Traffic, ranks_per_node
from moesaic.dist.exchange.hierarchical import groups_by_node
from moesaic.dist.expert_parallel import ExpertParallel
from moesaic.dist.mesh import Meshes
from moesaic.dist.placement import blocks_of, distribute, expert_placements, fsdp_dimension, replicated_of
from moesaic.errors import ConfigError, UnsupportedModel
from moesaic.hf import MoesaicModel
from moesaic.hf.backbone import decoder_layers
from moesaic.layer import Experts, MoEBlock

logger = logging.getLogger(__name__)


@dataclass
class Sharded:
    """A model that was spread over processes.

    Attributes:
        model: the model, changed in place.
        meshes: where it is.
        replicated: parameters that every process holds; their gradients are summed by `sync_replicated`.
        traffic: what this process sent in exchanges of tokens since it was last asked.
    """

    model: nn.Module
    meshes: Meshes
    replicated: list[nn.Parameter] = field(default_factory=list)
    traffic: Traffic = field(default_factory=Traffic)

    def set_last_micro_batch(self, last: bool) -> None:
        """Say before a backward pass whether it is the last of its step: only then are replicas summed."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.set_requires_all_reduce(last, recurse=False)
                module.set_is_last_backward(last)


def parallelize(
    model: nn.Module, meshes: Meshes, config: ParallelConfig, *, param_dtype: torch.dtype | None = None
) -> Sharded:
    """Spread a model whose parameters are whole, and equal, on all processes (or on the meta device).

    Gradients are sums over processes, never means: losses are shares of the mean over all tokens of a step. Experts
    that see the tokens of a whole group then need no other scale than the rest.

    Args:
        model: a causal language model of transformers or moesaic's, on its device.
        meshes: of the layout.
        config: the `parallel` section.
        param_dtype: dtype in which layers get their parameters, for use under autocast to it: sharded parameters are cast
            before they are gathered. They are kept, and gradients summed, in their own. Routers keep theirs, and so does
            the stream of hidden states between layers, as under autocast alone.

    Raises:
        UnsupportedModel: if its experts are not packed `Experts`.
        ConfigError: if a layer does not fit the layout or the exchange, or the model `config.partition_embedding`.
    """
    blocks = blocks_of(model)
    traffic, node_groups = Traffic(), _node_groups(meshes, config)
    logger.info("%s; %s", meshes.layout, _exchange_in_words(config, meshes, hierarchical=node_groups is not None))
    for block in blocks:
        _spread_experts(block, meshes)
        block.dispatch = ExpertParallel(
            cast(int, block.experts.num_experts),
            meshes.group("ep"),
            esp_group=meshes.group("esp"),
            exchange=config.exchange,
            node_groups=node_groups,
            capacity=block.capacity,
            variable_width=block.gate.config.variable_width,
            traffic=traffic,
        )
    for module in model.modules():
        if isinstance(module, MoesaicModel):
            module.batch_group = meshes.world.get_group()
    replicated = [parameter for block in blocks for parameter in replicated_of(block)]
    elsewhere = set(replicated)
    if config.partition_embedding:
        elsewhere.add(partition_embedding(model, meshes))
    _shard(model, meshes, elsewhere, param_dtype)
    return Sharded(model, meshes, replicated, traffic)


def _shard(
    model: nn.Module, meshes: Meshes, elsewhere: set[nn.Parameter], param_dtype: torch.dtype | None
) -> None:
    """FSDP2 over experts, decoder layers and the rest."""
    # Autocast casts what a product takes. Casts of all inputs would also reach weights of picks and the residual stream.
    policy = MixedPrecisionPolicy(
        param_dtype=param_dtype, reduce_dtype=torch.float32 if param_dtype else None, cast_forward_inputs=False
    )
    layers = decoder_layers(model)
    # Parameters are freed after forward also where one process has whole ones: it computes with a copy of them.
    for block in blocks_of(model):
        experts = cast(nn.Module, block.experts)
        place = functools.partial(_expert_dimension, _names(experts), meshes.layout.edp_shard)
        fully_shard(experts, mesh=meshes.expert_data, mp_policy=policy, shard_placement_fn=place)
    for module in (*layers, model):
        fully_shard(module, mesh=meshes.dense, mp_policy=policy, ignored_params=elsewhere)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            # gloo has no scaled sums.
            module.set_force_sum_reduction_for_comms(True)
        elif isinstance(module, nn.Embedding) and param_dtype is not None:
            module.register_forward_hook(functools.partial(_cast_output, module.weight.dtype))
        elif isinstance(module, nn.LayerNorm) and param_dtype is not None:
            # CPU kernels of layer norm take one dtype; autocast, which casts for those of GPUs, leaves them alone.
            module.register_forward_pre_hook(functools.partial(_cast_input, param_dtype))
            module.register_forward_hook(functools.partial(_cast_output, module.weight.dtype))
    if meshes.dense.device_type != "cpu":
        prefetch(model, layers)


def prefetch(model: nn.Module, layers: Sequence[nn.Module]) -> None:
    """Gather the parameters of the next layer while a layer computes, forward and backward.

    By itself FSDP gathers ahead of the device, as far as the host runs ahead of it. A ragged exchange makes the host wait
    in each layer.

    Args:
        model: sharded, the root.
        layers: its decoder layers in order, each sharded, with sharded experts inside.
    """
    units: list[list[FSDPModule]] = [
        [module for module in layer.modules() if isinstance(module, FSDPModule)] for layer in layers
    ]
    if not units:
        return
    root = cast(FSDPModule, model)
    root.set_modules_to_forward_prefetch(units[0])
    root.set_modules_to_backward_prefetch(units[-1])
    for lower, upper in itertools.pairwise(units):
        lower[0].set_modules_to_forward_prefetch(upper)
        upper[0].set_modules_to_backward_prefetch(lower)


def _cast_input(dtype: torch.dtype, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (args[0].to(dtype), *args[1:])


def _cast_output(dtype: torch.dtype, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    """What embeddings and norms give to the stream of hidden states, which autocast leaves in the parameters' own dtype."""
    return output.to(dtype)


def _spread_experts(block: MoEBlock, meshes: Meshes) -> None:
    """Keep this process's part of the experts."""
    experts = block.experts
    if not isinstance(experts, Experts):
        raise UnsupportedModel(
            f"layer {block.layer} has experts of class {type(experts).__name__}, which can't be spread over processes; "
            "only packed experts can: train with one process"
        )
    if experts.has_bias and experts.hidden_dim % meshes.layout.esp:
        raise ConfigError(
            "parallel.esp",
            meshes.layout.esp,
            f"does not divide the hidden size ({experts.hidden_dim}), over which the experts' bias is split",
            "choose a divisor of it",
        )
    for name, parameter in list(experts.named_parameters(recurse=False)):
        experts.register_parameter(name, distribute(parameter, meshes.experts, expert_placements(experts, name)))
    # A token arrives with all of its picks, also those that other processes serve.
    experts.may_skip = experts.may_skip or meshes.layout.ep > 1


def _node_groups(meshes: Meshes, config: ParallelConfig) -> tuple[dist.ProcessGroup, dist.ProcessGroup] | None:
    """Groups for the all-to-all in two steps; None for that in one."""
    layout, per_node = meshes.layout, max(1, ranks_per_node() // meshes.layout.esp)
    if layout.ep == 1 or config.all_to_all == "flat":
        return None
    if config.all_to_all == "auto":
        spans = 1 < per_node < layout.ep and layout.ep % per_node == 0
        if not spans or config.exchange == "all_gather":
            return None
    return groups_by_node(meshes.sparse, "ep", min(per_node, layout.ep))


def _exchange_in_words(config: ParallelConfig, meshes: Meshes, *, hierarchical: bool) -> str:
    """For the log: which exchange runs, and why."""
    if meshes.layout.ep == 1:
        return "every process has all experts, or its slice of each: no all-to-all"
    if config.exchange == "all_gather":
        return "every process of an expert-parallel group gets all tokens (parallel.exchange)"
    steps = "in two steps, within hosts and between them" if hierarchical else "in one step"
    host = f"{ranks_per_node()} processes share a host"
    why = host if config.all_to_all == "auto" else "parallel.all_to_all"
    return f"{config.exchange} all-to-all {steps} ({why})"


def _names(experts: nn.Module) -> dict[nn.Parameter, str]:
    return {parameter: name for name, parameter in experts.named_parameters(recurse=False)}


def _expert_dimension(names: dict[nn.Parameter, str], shards: int, parameter: nn.Parameter) -> Shard:
    return Shard(fsdp_dimension(names[parameter], cast(Tensor, parameter), shards))
