"""The token embedding in columns: each process holds V x D / W of it, and no gradient of it is ever summed.

In data parallelism every process looks up other tokens, so a copy of the table, or a gathered one, costs a sum of
gradients as large as itself. With columns, ids travel to all processes, each looks up its columns for all tokens, and one
all-to-all brings every process all columns of its own tokens; backward, one all-to-all the other way. Source: SE-MoE (arXiv
2205.10034, embedding partition in data parallelism).
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_gather_tensor, all_to_all_single_autograd
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from moesaic.dist.mesh import Meshes
from moesaic.dist.placement import COLUMNS, distribute
from moesaic.errors import ConfigError, TrainingError, UnsupportedModel

_FIELD = "parallel.partition_embedding"


class PartitionedEmbedding(nn.Module):
    """What a token embedding becomes: its class is extended by this one, its `weight` a DTensor with the columns dealt out.

    All processes must look up equally many tokens at a time, in the same order of calls.
    """

    weight: nn.Parameter
    _shape: torch.Size | None = None

    def forward(self, ids: Tensor) -> Tensor:
        """Rows (..., D) of this process's ids (...).

        Raises:
            TrainingError: if processes have different numbers of tokens.
        """
        table = cast(DTensor, self.weight)
        group = table.device_mesh.get_group()
        self._check_equal(ids, group)
        ids_WT = all_gather_tensor(ids.reshape(-1), 0, group).view(dist.get_world_size(group), -1)
        columns_WTC = self._looked_up(ids_WT, table.to_local())
        # From "my columns of everybody's tokens" to "everybody's columns of my tokens".
        received_XC = all_to_all_single_autograd(columns_WTC.flatten(0, 1), None, None, group)
        rows_TWC = received_XC.view(columns_WTC.shape).transpose(0, 1)
        return rows_TWC.reshape(*ids.shape, -1)

    def _looked_up(self, ids: Tensor, columns_VC: Tensor) -> Tensor:
        """What the stock embedding makes of its local columns; it may scale them."""
        parameters = cast(dict[str, Any], self._parameters)
        table = parameters["weight"]
        parameters["weight"] = columns_VC
        try:
            return super().forward(ids)  # type: ignore[misc]
        finally:
            parameters["weight"] = table

    def _check_equal(self, ids: Tensor, group: dist.ProcessGroup) -> None:
        # Whenever the shape changes, which it must on all processes at once.
        if ids.shape == self._shape:
            return
        extremes = torch.tensor([ids.numel(), -ids.numel()], device=ids.device)
        dist.all_reduce(extremes, dist.ReduceOp.MAX, group=group)
        most, least = extremes.tolist()
        if most != -least:
            raise TrainingError(
                f"processes look up {-least} to {most} tokens at a time: with {_FIELD} all must have batches of one size"
            )
        self._shape = ids.shape


def partition_embedding(model: nn.Module, meshes: Meshes) -> nn.Parameter:
    """Deal out the columns of the token embedding of a model over all processes, in place.

    Args:
        model: a model of transformers or moesaic's, whose parameters are whole (or on the meta device).
        meshes: of the layout.

    Returns:
        The new parameter, which other ways of sharding must leave alone.

    Raises:
        ConfigError: if the width can't be dealt out evenly, or the head uses the same table.
        UnsupportedModel: if the model has no token embedding of the usual kind.
    """
    embedding = partitionable(model, meshes.layout.world)
    embedding.weight = distribute(cast(nn.Parameter, embedding.weight), meshes.world, COLUMNS)
    kind = type(embedding)
    embedding.__class__ = type(f"Partitioned{kind.__name__}", (PartitionedEmbedding, kind), {})
    return embedding.weight


def partitionable(model: nn.Module, world: int) -> nn.Embedding:
    """The token embedding of a model, whose columns `world` processes can share.

    Raises:
        ConfigError: if the width can't be dealt out evenly, or the head uses the same table.
        UnsupportedModel: if the model has no token embedding of the usual kind.
    """
    embedding = model.get_input_embeddings() if isinstance(model, PreTrainedModel) else None
    if not isinstance(embedding, nn.Embedding) or embedding.max_norm is not None or embedding.sparse:
        raise UnsupportedModel(f"{type(model).__name__} has no token embedding that {_FIELD} can deal out; set it to false")
    width = embedding.embedding_dim
    if width % world:
        raise ConfigError(_FIELD, True, f"needs a hidden_size ({width}) that {world} processes can share", "set it to false")
    names = model.named_parameters(remove_duplicate=False)
    users = [name for name, parameter in names if parameter is embedding.weight]
    if len(users) > 1:
        raise ConfigError(
            _FIELD, True, f"does not go with tied embeddings ({' and '.join(users)})", "set tie_word_embeddings: false"
        )
    return embedding


def partitioned_elements(tokens: int, hidden_size: int, world: int) -> float:
    """Elements that a process sends in a step with the columns dealt out: ids, and rows forward and backward.

    Args:
        tokens: T of one process.
        hidden_size: D.
        world: W.
    """
    return 2 * tokens * hidden_size * (world - 1) / world + tokens * (world - 1)


def replicated_elements(vocab_size: int, hidden_size: int, world: int) -> float:
    """Elements that a process sends to sum the gradient of a whole table; so much, too, sends FSDP without a gather in
    backward: one all-gather and one reduce-scatter.

    Args:
        vocab_size: V.
        hidden_size: D.
        world: W.
    """
    return 2 * vocab_size * hidden_size * (world - 1) / world
