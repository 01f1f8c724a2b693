from __future__ import annotations

import pytest
import torch

from moesaic.errors import ConfigError
from moesaic.layer import MoESpec, RandomSkipConfig, RoutingContext, TopKConfig


def test_the_last_pick_runs_for_the_wanted_share_of_tokens():
    router = RandomSkipConfig(top_k=3, keep=0.7).build(16, 8)
    x_TD = torch.randn(4000, 16, generator=torch.Generator().manual_seed(0))
    routing = router(x_TD, RoutingContext(seed=torch.tensor(3)))
    skipped_TK = routing.index_TK == 8
    assert not skipped_TK[:, :-1].any()
    assert 1 - skipped_TK[:, -1].double().mean() == pytest.approx(0.7, abs=0.03)
    assert router.picks == 2.7


def test_what_runs_is_weighted_as_in_top_k_of_so_many():
    router = RandomSkipConfig(top_k=2, keep=0.5).build(16, 8)
    x_TD = torch.randn(50, 16, generator=torch.Generator().manual_seed(0))
    routing = router(x_TD)
    skipped_T = routing.index_TK[:, 1] == 8
    assert 0 < skipped_T.sum() < 50
    for top_k, rows_T in ((1, skipped_T), (2, ~skipped_T)):
        plain = TopKConfig(top_k=top_k, softmax_over="selected").build(16, 8)
        plain.load_state_dict(router.state_dict())
        expected = plain(x_TD[rows_T])
        assert torch.equal(routing.index_TK[rows_T, :top_k], expected.index_TK)
        torch.testing.assert_close(routing.weight_TK[rows_T, :top_k], expected.weight_TK)
    assert (routing.weight_TK[skipped_T, 1] == 0).all()
    assert torch.equal(routing.choice_TK, routing.scores_TN.topk(2).indices)


def test_bad_fields():
    for fields, message in [({"top_k": 1, "keep": 0.5}, "top_k"), ({"top_k": 2, "keep": 1.0}, "keep")]:
        with pytest.raises(ConfigError, match=message):
            RandomSkipConfig.from_dict(fields)
    with pytest.raises(ConfigError, match=r"router\.top_k = 5 is larger than num_experts \(4\)"):
        MoESpec.from_dict(
            {
                "experts": {"num_experts": 4, "intermediate_size": 8},
                "router": {"type": "random_skip", "top_k": 5, "keep": 0.5},
            }
        )
