"""How many bytes of a model's weights belong to its experts, and how many to all tokens alike."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedModel

from moesaic.errors import UnsupportedModel
from moesaic.hf.model import MoesaicModel
from moesaic.hf.stock_routing import stock_routers


@dataclass(frozen=True)
class WeightSizes:
    """Bytes of weights by who needs them in a forward pass.

    Attributes:
        shared: needed by every pass: attention, norms, routers, shared experts, dense layers, output head.
        experts: of one routed expert, by decoder layer index.
        head: what the output head has of `shared`.
    """

    shared: float
    experts: dict[int, float]
    head: float = 0.0

    @property
    def per_expert(self) -> float:
        """Of one expert in every MoE layer."""
        return sum(self.experts.values())


def weight_sizes(model: PreTrainedModel) -> WeightSizes:
    """Count a model as it is stored: ours, a stock MoE model, or a dense one.

    The table of input embeddings, of which a pass reads only the rows of its tokens, is not counted unless it is the output
    head too.
    """
    # Of parameters that modules share, one.
    total = {id(tensor): _bytes([tensor]) for tensor in (*model.parameters(), *model.buffers())}
    head = model.get_output_embeddings()
    embedding = model.get_input_embeddings()
    if isinstance(embedding, nn.Embedding) and (head is None or head.weight is not embedding.weight):
        total.pop(id(embedding.weight), None)
    sums = {
        layer: _bytes((*experts.parameters(), *experts.buffers())) for layer, (experts, _) in _experts(model).items()
    }
    counts = {layer: count for layer, (_, count) in _experts(model).items()}
    return WeightSizes(
        shared=sum(total.values()) - sum(sums.values()),
        experts={layer: sums[layer] / counts[layer] for layer in sums},
        head=0 if head is None else _bytes(head.parameters()),
    )


def _experts(model: PreTrainedModel) -> dict[int, tuple[nn.Module, int]]:
    """The experts of each MoE layer, and how many there are."""
    ours = next((module for module in model.modules() if isinstance(module, MoesaicModel)), None)
    if ours is not None:
        return {layer: (block.experts, block.gate.num_experts) for layer, block in ours.moe_blocks().items()}
    try:
        routers = stock_routers(model, tables=True)
    except UnsupportedModel:
        return {}  # all of it counts as shared
    return {layer: (router.block.get_submodule("experts"), router.num_experts) for layer, router in routers.items()}


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
