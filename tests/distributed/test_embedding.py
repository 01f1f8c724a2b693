"""The token embedding dealt out in columns equals the whole table, and sends what the formula says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.distributed.models import batches, model, spec
from tests.distributed.spawn import Worlds
from tests.distributed.test_parallelize import alone, loss_of, together
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from moesaic.dist import Layout, Meshes, ParallelConfig, parallelize
from moesaic.dist.embedding import partitioned_elements, replicated_elements
from moesaic.errors import ConfigError, TrainingError

GEMMA = {"model_type": "gemma3_text", "head_dim": 8, "tie_word_embeddings": False}


@pytest.mark.parametrize(("world", "parallel"), [(2, {}), (4, {"dp_replicate": 2, "ep": 2})], ids=str)
def test_steps_equal_one_process(worlds: Worlds, world: int, parallel: dict[str, Any]) -> None:
    expected = torch.tensor(alone({}, 2))
    for found in worlds(world, together, {}, 2, {**parallel, "partition_embedding": True}, False):
        torch.testing.assert_close(torch.tensor(found), expected, rtol=0, atol=1e-5)


def gradient(backbone: dict[str, Any], partition: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The whole gradient of the table, and this rank's embedded tokens."""
    module = model(**backbone)
    config = ParallelConfig(partition_embedding=partition)
    parallelize(module, Meshes.of(Layout.of(config, dist.get_world_size(), spec()), "cpu"), config)
    table = module.get_input_embeddings()
    seen: list[torch.Tensor] = []
    table.register_forward_hook(lambda _, args, output: seen.append(output.detach().clone()))
    ids_BS = batches(1)[0]
    loss_of(module, ids_BS.chunk(dist.get_world_size())[dist.get_rank()], ids_BS[:, 1:].numel()).backward()
    assert isinstance(table.weight.grad, DTensor)
    return table.weight.grad.full_tensor(), seen[0]


@pytest.mark.parametrize("backbone", [{}, GEMMA], ids=["plain", "scaled"])
def test_outputs_and_gradients_equal_those_of_a_whole_table(worlds: Worlds, backbone: dict[str, Any]) -> None:
    parts, wholes = (worlds(2, gradient, backbone, partition) for partition in (True, False))
    for (gradient_VD, rows), (expected_VD, expected) in zip(parts, wholes, strict=True):
        assert torch.equal(rows, expected)
        assert expected_VD.abs().max() > 1e-3
        torch.testing.assert_close(gradient_VD, expected_VD, rtol=0, atol=1e-6)


class _Sent(TorchDispatchMode):
    """Elements that this process sends to others in collectives."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, world = func._schema.name, dist.get_world_size()
        if name == "_c10d_functional::all_to_all_single":
            self.elements += args[0].numel() * (world - 1) / world
        elif name == "_c10d_functional::all_gather_into_tensor":
            self.elements += args[0].numel() * (world - 1)
        return func(*args, **(kwargs or {}))


def sent_by_lookup(rows: int) -> float:
    module = model()
    config = ParallelConfig(partition_embedding=True)
    meshes = Meshes.of(Layout.of(config, dist.get_world_size(), spec()), "cpu")
    parallelize(module, meshes, config)
    table = module.get_input_embeddings()
    with _Sent() as sent:
        table(torch.zeros(rows, 12, dtype=torch.int64)).square().sum().backward()
    return sent.elements


def test_elements_are_those_of_the_formula(worlds: Worlds) -> None:
    for rows in (1, 3):
        assert worlds(4, sent_by_lookup, rows) == [partitioned_elements(rows * 12, 16, 4)] * 4


def test_published_volumes() -> None:
    """V = 50304, D = 8192, W = 8, in millions: cheaper than the sum of gradients up to about T = V tokens."""
    volumes = [partitioned_elements(tokens, 8192, 8) / 1e6 for tokens in (1024, 8192, 65536)]
    assert [round(volume, 1) for volume in volumes] == [14.7, 117.5, 940.0]
    assert round(replicated_elements(50304, 8192, 8) / 1e6) == 721
    assert (
        partitioned_elements(50000, 8192, 8)
        < replicated_elements(50304, 8192, 8)
        < partitioned_elements(50400, 8192, 8)
    )


def refused(backbone: dict[str, Any]) -> str:
    config = ParallelConfig(partition_embedding=True)
    meshes = Meshes.of(Layout.of(config, dist.get_world_size(), spec()), "cpu")
    with pytest.raises(ConfigError) as raised:
        parallelize(model(**backbone), meshes, config)
    return str(raised.value)


def unequal() -> str:
    module = model()
    config = ParallelConfig(partition_embedding=True)
    parallelize(module, Meshes.of(Layout.of(config, dist.get_world_size(), spec()), "cpu"), config)
    with pytest.raises(TrainingError) as raised:
        module(torch.zeros(1 + dist.get_rank(), 4, dtype=torch.int64))
    return str(raised.value)


def test_what_does_not_go_is_refused(worlds: Worlds) -> None:
    for message in worlds(3, refused, {}):
        assert "parallel.partition_embedding" in message
        assert "hidden_size (16)" in message
    for message in worlds(2, refused, {"tie_word_embeddings": True}):
        assert "lm_head.weight" in message
    for message in worlds(2, unequal):
        assert "4 to 8 tokens" in message
