"""The device meshes of a layout."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from moesaic.dist.layout import Layout


@dataclass(frozen=True)
class Meshes:
    """Views of all processes. Axes of size 1 exist like others, so that no code asks which are used.

    Attributes:
        layout: the sizes.
        world: all processes, 1-D.
        dense: (dp_replicate, dp_shard).
        sparse: (edp_replicate, edp_shard, ep, esp).
    """

    layout: Layout
    world: DeviceMesh
    dense: DeviceMesh
    sparse: DeviceMesh

    @classmethod
    def of(cls, layout: Layout, device_type: str) -> Meshes:
        """The meshes over the processes of torch.distributed, which must be started; a collective call.

        Args:
            layout: sizes, which must multiply to the number of processes.
            device_type: "cpu" or "cuda".
        """
        dense = (layout.dp_replicate, layout.dp_shard)
        sparse = (layout.edp_replicate, layout.edp_shard, layout.ep, layout.esp)
        return cls(
            layout,
            init_device_mesh(device_type, (layout.world,), mesh_dim_names=("world",)),
            init_device_mesh(device_type, dense, mesh_dim_names=("dp_replicate", "dp_shard")),
            init_device_mesh(device_type, sparse, mesh_dim_names=("edp_replicate", "edp_shard", "ep", "esp")),
        )

    @property
    def expert_data(self) -> DeviceMesh:
        """(edp_replicate, edp_shard): processes that hold the same experts."""
        return self.sparse["edp_replicate", "edp_shard"]

    @property
    def experts(self) -> DeviceMesh:
        """(ep, esp): processes that hold a whole set of experts together."""
        return self.sparse["ep", "esp"]

    def group(self, axis: str) -> dist.ProcessGroup:
        """The group of this process along an axis of the sparse mesh."""
        return self.sparse.get_group(axis)
