from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moesaic.errors import ConfigError
from moesaic.trace import TokenShare, coactivation, coactivation_counts, load_shares, relative_load, top_tokens
from moesaic.trace.metrics import FrequencyBucket, experts_by_frequency, experts_per_token

N = 3  # experts of the worked example; a pick of 3 is no expert
INDEX_TK = torch.tensor([[0, 1], [1, 0], [0, 2], [2, N], [N, N]])
TOKEN_IDS_T = torch.tensor([7, 7, 9, 9, 9])


def test_shares_of_a_load():
    load_N = torch.tensor([3, 0, 1])
    assert load_shares(load_N).tolist() == [0.75, 0.0, 0.25]
    assert relative_load(load_N).tolist() == [2.25, 0.0, 0.75]


def test_no_pick_at_all_gives_zeros_not_nan():
    assert load_shares(torch.zeros(4, dtype=torch.int64)).tolist() == [0.0] * 4


def test_coactivation_of_the_worked_example():
    assert coactivation_counts(INDEX_TK, N).tolist() == [[3, 2, 1], [2, 2, 0], [1, 0, 2]]
    expected = [[0, 2 / 3, 1 / 3], [1, 0, 0], [1 / 2, 0, 0]]
    torch.testing.assert_close(coactivation(INDEX_TK, N), torch.tensor(expected, dtype=torch.float64))


def test_one_pick_has_no_pairs():
    shares_NN = coactivation(torch.tensor([[0], [2]]), N)
    assert shares_NN[[0, 2]].count_nonzero() == 0
    assert shares_NN[1].isnan().all()  # nobody picked it: not defined, which is not 0


@given(st.integers(1, 5), st.integers(0, 3), st.integers(0, 40), st.integers(0, 99))
def test_rows_of_used_experts_sum_to_k_minus_one(top_k: int, spare: int, tokens: int, seed: int):
    num_experts = top_k + spare
    scores_TN = torch.rand(tokens, num_experts, generator=torch.Generator().manual_seed(seed))
    index_TK = scores_TN.topk(top_k).indices
    counts_NN = coactivation_counts(index_TK, num_experts)
    assert torch.equal(counts_NN, counts_NN.T)
    assert torch.equal(counts_NN.diagonal(), torch.bincount(index_TK.reshape(-1), minlength=num_experts))
    sums_N = coactivation(index_TK, num_experts).sum(-1)
    used_N = counts_NN.diagonal() > 0
    torch.testing.assert_close(sums_N[used_N], torch.full_like(sums_N[used_N], top_k - 1))
    assert sums_N[~used_N].isnan().all()


def test_top_tokens_by_count():
    found = top_tokens(INDEX_TK, TOKEN_IDS_T, N, by="count")
    assert [[(item.token_id, item.count) for item in expert] for expert in found] == [
        [(7, 2), (9, 1)],
        [(7, 2)],
        [(9, 2)],
    ]


def test_top_tokens_by_lift():
    # Expert 0 has 3 picks, 2 of them token 7, which is 2 of 5 tokens: (2/3) / (2/5).
    found = top_tokens(INDEX_TK, TOKEN_IDS_T, N, by="lift")
    assert found[0] == [TokenShare(7, 2, pytest.approx(5 / 3)), TokenShare(9, 1, pytest.approx(5 / 9))]
    assert found[1] == [TokenShare(7, 2, pytest.approx(5 / 2))]


def test_rare_tokens_are_left_out_and_lists_are_cut():
    assert top_tokens(INDEX_TK, TOKEN_IDS_T, N, minimum=2)[0] == [TokenShare(7, 2, pytest.approx(5 / 3))]
    assert [len(expert) for expert in top_tokens(INDEX_TK, TOKEN_IDS_T, N, top=1)] == [1, 1, 1]


def test_ties_go_to_the_higher_count_then_the_lower_id():
    index_T1 = torch.zeros(6, 1, dtype=torch.int64)
    found = top_tokens(index_T1, torch.tensor([5, 4, 5, 3, 4, 8]), 1, by="lift")  # every lift is 1
    assert [item.token_id for item in found[0]] == [4, 5, 3, 8]


def test_token_ids_of_another_length_are_refused():
    with pytest.raises(ConfigError, match=r"token_ids_T = 4 .*pass 5 ids"):
        top_tokens(INDEX_TK, TOKEN_IDS_T[:4], N)


# --- Experts of a token -----------------------------------------------------------------------------------------------


def test_experts_per_token_leaves_picks_of_no_expert_out() -> None:
    index_TK = torch.tensor([[0, 1, 4], [4, 4, 4], [3, 2, 1]])
    assert experts_per_token(index_TK, 4).tolist() == [2, 0, 3]


def test_experts_by_frequency_of_a_hand_made_text() -> None:
    """Token 7 occurs four times and runs one expert each, token 5 twice with two, tokens 1 and 2 once with three."""
    token_ids_T = torch.tensor([7, 5, 7, 1, 7, 5, 2, 7])
    experts = {7: 1, 5: 2, 1: 3, 2: 3}
    index_TK = torch.tensor([[k if k < experts[token] else 9 for k in range(3)] for token in token_ids_T.tolist()])
    found = experts_by_frequency(index_TK, token_ids_T, num_experts=9, buckets=4)
    assert found == [
        FrequencyBucket(least=1, most=1, tokens=2, experts=3.0),
        FrequencyBucket(least=2, most=2, tokens=2, experts=2.0),
        FrequencyBucket(least=4, most=4, tokens=4, experts=1.0),
    ]


def test_tokens_that_occur_equally_often_share_a_bucket() -> None:
    index_TK = torch.tensor([[0], [1], [0], [2]])
    found = experts_by_frequency(index_TK, torch.arange(4), num_experts=2, buckets=3)
    assert found == [FrequencyBucket(least=1, most=1, tokens=4, experts=0.75)]
    assert experts_by_frequency(index_TK[:0], torch.arange(0), num_experts=2) == []
