"""The load of a step: what it counts, and sums over passes and ranks."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moesaic.layer import LayerLoad, Routing, all_reduce_loads


def record(index: list[list[int]], statistics: dict[str, Tensor] | None = None) -> Routing:
    index_TK = torch.tensor(index)
    scores_TN = torch.full((len(index), 3), 1 / 3)
    weight_TK = torch.ones(index_TK.shape)
    return Routing(index_TK, weight_TK, scores_TN.log(), scores_TN, scores_TN, statistics=statistics or {})


def test_counts_and_statistics_add_up_over_passes() -> None:
    first = LayerLoad.of(record([[0, 1], [0, 3]], {"sum": torch.tensor([0.5, 1.0])}))
    second = LayerLoad.of(record([[2, 1]], {"sum": torch.tensor([2.0, 0.25])}))
    total = first + second
    assert total.load_N.tolist() == [2, 2, 1]
    assert (int(total.tokens), int(total.dropped)) == (3, 0)
    assert total.statistics["sum"].tolist() == [2.5, 1.25]
    assert total.statistics["sum"].dtype == torch.float64


@pytest.mark.parametrize("statistics", [{}, {"sum": torch.tensor([0.5, 1.0]), "number": torch.tensor(3.0)}])
def test_ranks_are_summed_field_by_field(statistics: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks that hold the same: everything doubles, in its place."""
    calls: list[torch.dtype] = []

    def double(tensor: Tensor, group: object = None) -> None:
        calls.append(tensor.dtype)
        tensor.mul_(2)

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: 2)
    monkeypatch.setattr(dist, "all_reduce", double)
    load = LayerLoad.of(record([[0, 1], [0, 3]], statistics))
    loads = all_reduce_loads({4: load, 7: load + load})
    assert loads[4].load_N.tolist() == [4, 2, 0]
    assert loads[7].chosen_M.tolist() == [8, 4, 0]
    assert (int(loads[4].tokens), int(loads[7].tokens)) == (4, 8)
    for name, value in statistics.items():
        assert loads[4].statistics[name].tolist() == (2 * value).tolist()
        assert loads[7].statistics[name].tolist() == (4 * value).tolist()
    assert calls == [torch.int64, torch.float64][: 2 if statistics else 1]
