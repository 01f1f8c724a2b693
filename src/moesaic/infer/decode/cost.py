"""What a decoding costs where reading weights is what takes time: a model of bytes, from counts and sizes alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from moesaic.errors import ConfigError
from moesaic.hf.weight_sizes import WeightSizes


def pass_bytes(sizes: WeightSizes, experts: Mapping[int, float] | float, *, heads: float = 1) -> float:
    """Bytes of weights that one forward pass of few tokens reads: the shared ones, and every expert that a token picked, once.

    Rows of a batch that pick the same expert read it together, which is why two rows cost less than two passes. Activations
    and the cache of keys and values are left out.

    Args:
        sizes: of the model.
        experts: distinct experts that the tokens of the pass picked, by layer; a number stands for every layer.
        heads: how often the output head was used.

    Raises:
        ConfigError: if there are counts of other layers than sizes.
    """
    if not isinstance(experts, Mapping):
        experts = dict.fromkeys(sizes.experts, experts)
    if experts.keys() != sizes.experts.keys():
        odd = min(experts.keys() ^ sizes.experts.keys())
        raise ConfigError(
            "experts", sorted(experts), f"and the sizes do not both have layer {odd}", "count the same model"
        )
    return sizes.shared + (heads - 1) * sizes.head + sum(sizes.experts[layer] * experts[layer] for layer in experts)


@dataclass(frozen=True)
class Work:
    """What was computed, by all models that took part; works can be added, subtracted and divided by a number of tokens.

    Attributes:
        passes: forward passes.
        positions: tokens that went through them, those of all rows: strong and weak, beams, candidates.
        weight_bytes: that they read, by `pass_bytes`.
        experts: distinct experts picked, summed over passes and MoE layers.
        layers: MoE layers that ran, summed over passes.
    """

    passes: float = 0
    positions: float = 0
    weight_bytes: float = 0
    experts: float = 0
    layers: float = 0

    def __add__(self, other: Work) -> Work:
        return Work(*(ours + theirs for ours, theirs in zip(_values(self), _values(other), strict=True)))

    def __sub__(self, other: Work) -> Work:
        return self + other.scaled(-1)

    def scaled(self, factor: float) -> Work:
        """All of it times a number."""
        return Work(*(factor * value for value in _values(self)))

    @property
    def experts_per_layer(self) -> float:
        """Distinct experts that a pass reads in an MoE layer, on average; 0 without MoE layers."""
        return self.experts / self.layers if self.layers else 0.0


def _values(work: Work) -> Iterable[float]:
    return (work.passes, work.positions, work.weight_bytes, work.experts, work.layers)
