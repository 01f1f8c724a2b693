"""The all-to-all in two steps: inside a node to the rank with the destination's local index, then between nodes.

A rank of n nodes with p ranks each sends n - 1 messages to other nodes instead of (n - 1) p, each p times as long. What
arrives is bit for bit what one step brings, in the same order. Source: SE-MoE (arXiv 2205.10034).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from moesaic.dist.exchange.collectives import Pending, Then, all_to_all
from moesaic.dist.exchange.traffic import Traffic
from moesaic.errors import ConfigError


@dataclass(frozen=True)
class Hierarchical:
    """A mover in two all-to-alls, for ranks numbered node by node.

    Counts are those sent, those received, and those between the steps: from each rank of the node, for each node. Of
    the two steps the one between nodes is the slow one, which is left under way.

    Attributes:
        node_group: the ranks of all nodes with this rank's local index.
        local_group: the ranks of this node.
        traffic: where bytes and waiting are counted.
    """

    node_group: dist.ProcessGroup
    local_group: dist.ProcessGroup
    traffic: Traffic | None = None

    @property
    def size(self) -> int:
        """Ranks on all nodes, P."""
        return self._nodes * self._local

    @property
    def _nodes(self) -> int:
        return self.node_group.size()

    @property
    def _local(self) -> int:
        return self.local_group.size()

    def learn(self, sent_P: Tensor) -> Tensor:
        nodes, local = [self._nodes] * self._local, [self._local] * self._nodes
        by_local_P = sent_P.view(self._nodes, self._local).t().reshape(-1)
        between_P = all_to_all(by_local_P, nodes, nodes, self.local_group, self.traffic).wait()
        by_node_P = between_P.view(self._local, self._nodes).t().reshape(-1)
        received_P = all_to_all(by_node_P, local, local, self.node_group, self.traffic).wait()
        return torch.stack([sent_P, received_P, between_P])

    def out(self, rows_SX: Tensor, counts: Sequence[Sequence[int]]) -> Pending:
        sent, received, between = counts
        n, p = self._nodes, self._local
        by_local_SX = _regrouped(rows_SX, sent, n, p)
        inside_RX = all_to_all(
            by_local_SX, _sums(sent, n, p)[1], _sums(between, p, n)[0], self.local_group, self.traffic
        ).wait()
        by_node_RX = _regrouped(inside_RX, between, p, n)
        return all_to_all(
            by_node_RX, _sums(between, p, n)[1], _sums(received, n, p)[0], self.node_group, self.traffic
        )

    def back(self, rows_RX: Tensor, counts: Sequence[Sequence[int]], spare: int) -> Pending:
        sent, received, between = counts
        n, p = self._nodes, self._local
        slow = all_to_all(
            rows_RX, _sums(received, n, p)[0], _sums(between, p, n)[1], self.node_group, self.traffic
        )

        def inside(by_node_RX: Tensor) -> Tensor:
            by_local_RX = _regrouped(by_node_RX, _transposed(between, p, n), n, p)
            rows_SX = all_to_all(
                by_local_RX, _sums(between, p, n)[0], _sums(sent, n, p)[1], self.local_group, self.traffic
            ).wait()
            return _regrouped(rows_SX, _transposed(sent, n, p), p, n, spare)

        return Then(slow, inside)


def groups_by_node(mesh: DeviceMesh, axis: str, per_node: int) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """The two groups of this rank along one axis of a mesh; a collective call of all ranks of the mesh.

    Args:
        mesh: whose ranks along the axis are numbered node by node.
        axis: its name.
        per_node: ranks along the axis that share a node.
    """
    assert mesh.mesh_dim_names is not None
    place = mesh.mesh_dim_names.index(axis)
    sizes = list(mesh.mesh.shape)
    if sizes[place] % per_node:
        raise ConfigError(
            "parallel.all_to_all",
            "hierarchical",
            f"needs as many ranks on each node, and {sizes[place]} ranks are not a multiple of {per_node}",
            "use flat",
        )
    split = mesh.mesh.unflatten(place, (-1, per_node))
    names = tuple(f"axis_{number}" for number in range(split.ndim))
    by_node = DeviceMesh(mesh.device_type, split, mesh_dim_names=names)
    return by_node.get_group(place), by_node.get_group(place + 1)


def _transposed(counts: Sequence[int], outer: int, inner: int) -> list[int]:
    """Counts in (outer, inner) order as (inner, outer)."""
    return [counts[i * inner + j] for j in range(inner) for i in range(outer)]


def _sums(counts: Sequence[int], outer: int, inner: int) -> tuple[list[int], list[int]]:
    """Sums of counts in (outer, inner) order for each outer, and for each inner."""
    by_outer = [sum(counts[i * inner : (i + 1) * inner]) for i in range(outer)]
    return by_outer, [sum(counts[j::inner]) for j in range(inner)]


def _regrouped(rows_SX: Tensor, counts: Sequence[int], outer: int, inner: int, spare: int = 0) -> Tensor:
    """Blocks of rows in (outer, inner) order as (inner, outer), and rows of zeros after them."""
    blocks = rows_SX.split(list(counts))
    zeros = [rows_SX.new_zeros(spare, *rows_SX.shape[1:])] if spare else []
    return torch.cat([blocks[i * inner + j] for j in range(inner) for i in range(outer)] + zeros)
