"""Hash routing: tables and hashes against slow references, sequence starts, parity with DeepSeek-V4, refusals."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4HashRouter

from moesaic.errors import ConfigError
from moesaic.layer import HashConfig, HashRouter, RoutingContext
from moesaic.layer.routers.hash import balanced_table

N, D, V = 8, 4, 4000


def make_router(**fields: Any) -> HashRouter:
    return HashConfig.from_dict({"vocabulary_size": V, **fields}).build(D, N).double()


def experts_of(router: HashRouter, ids: Sequence[int], **context: Any) -> list[list[int]]:
    x_TD = torch.zeros(len(ids), D, dtype=torch.float64)
    return router(x_TD, RoutingContext(token_ids_T=torch.tensor(ids), **context)).index_TK.tolist()


# --- Random hash ------------------------------------------------------------------------------------------------------


def test_random_hash_is_a_function_of_the_id() -> None:
    router = make_router(top_k=2)
    first, second, again = experts_of(router, [5, 9, 5])
    assert first == again
    assert [first] == experts_of(router, [5])
    assert first != second


@pytest.mark.parametrize("top_k", [1, 3])
def test_random_hash_is_uniform(top_k: int) -> None:
    """Counts over all ids: mean V K / N, standard deviation below its root."""
    counts_N = torch.tensor(experts_of(make_router(top_k=top_k), range(V))).flatten().bincount(minlength=N)
    mean = V * top_k / N
    assert (counts_N - mean).abs().max() < 4 * mean**0.5


def test_layers_and_seeds_have_their_own_hash() -> None:
    routers = [make_router(), make_router(seed=1), make_router()]
    routers[2].layer = 3
    tables = [torch.tensor(experts_of(router, range(V))) for router in routers]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert abs((tables[one] == tables[other]).double().mean().item() - 1 / N) < 0.03


def test_weights_are_equal() -> None:
    x_TD, context = torch.ones(2, D, dtype=torch.float64), RoutingContext(token_ids_T=torch.tensor([1, 2]))
    assert make_router(top_k=4)(x_TD, context).weight_TK.tolist() == [[0.25] * 4] * 2
    assert make_router(top_k=4, scaling_factor=2.0)(x_TD, context).weight_TK.tolist() == [[0.5] * 4] * 2


# --- Balanced table (arXiv 2106.04426, section 3) -------------------------------------------------------------------


def test_balanced_table_gives_ids_to_the_lightest_expert() -> None:
    """7 -> e0, 5 -> e1, 4 -> e2, 3 -> e2 (load 4), 3 -> e1 (5), 1 -> e0 (7, tied with e2, which has more ids)."""
    assert balanced_table([3, 7, 1, 5, 4, 3], 3).flatten().tolist() == [2, 0, 0, 1, 2, 1]


@given(
    frequencies=st.lists(st.integers(0, 20) | st.just(10**6), max_size=30),
    num_experts=st.integers(1, 6),
    data=st.data(),
)
@settings(deadline=None, max_examples=60)
def test_balanced_table_equals_a_slow_search(frequencies: list[int], num_experts: int, data: st.DataObject) -> None:
    top_k = data.draw(st.integers(1, num_experts))
    load, ids, expected = [0] * num_experts, [0] * num_experts, {}
    for token in sorted(range(len(frequencies)), key=lambda token: (-frequencies[token], token)):
        expected[token] = sorted(range(num_experts), key=lambda expert: (load[expert], ids[expert], expert))[:top_k]
        for expert in expected[token]:
            load[expert] += frequencies[token]
            ids[expert] += 1
    table_VK = balanced_table(frequencies, num_experts, top_k)
    assert table_VK.shape == (len(frequencies), top_k)
    assert table_VK.tolist() == [expected[token] for token in range(len(frequencies))]


def test_balanced_beats_random_on_skewed_frequencies() -> None:
    """Zipf's law: the heaviest expert of the balanced table holds its most frequent id and little else."""
    frequency_V = 1 / torch.arange(1, V + 1, dtype=torch.float64)
    loads = []
    for fields in ({}, {"table": "balanced", "frequencies": "zipf"}):
        expert_V = torch.tensor(experts_of(make_router(**fields), range(V))).flatten()
        loads.append(torch.zeros(N, dtype=torch.float64).index_add(0, expert_V, frequency_V).max().item())
    ideal = max(frequency_V.sum().item() / N, 1.0)
    assert loads[1] < 1.01 * ideal < 1.1 * ideal < loads[0]


def test_frequencies_come_from_a_file_or_a_call(tmp_path: Path) -> None:
    path, counts = tmp_path / "counts.json", [3, 7, 1, 5, 4, 3]
    path.write_text(json.dumps(counts))
    config = HashConfig(vocabulary_size=6, table="balanced", frequencies=str(path))
    router, other = config.build(D, 3), config.model_copy(update={"frequencies": "zipf"}).build(D, 3)
    assert router.tid2eid is not None
    assert other.tid2eid is not None
    assert router.tid2eid.flatten().tolist() == [2, 0, 0, 1, 2, 1]
    assert not torch.equal(router.tid2eid, other.tid2eid)
    other.set_frequencies(torch.tensor(counts))
    assert torch.equal(router.tid2eid, other.tid2eid)
    path.unlink()
    with torch.device("meta"):
        config.build(D, 3)  # a model whose weights come from a checkpoint needs the file no more


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", r"frequencies = '2 values' is not a list of vocabulary_size \(3\) counts"),
        ('{"a": 1}', r"frequencies = 'a dict' is not a list"),
        ("[1, -2, 3]", r"frequencies\[1\] = -2 is not a count"),
        ("[1, 2, NaN]", r"frequencies\[2\] = nan is not a count"),
        ("[1, 2, true]", r"frequencies\[2\] = True is not a count"),
        ("[1, 2", r"is not JSON"),
        (None, r"can't be read \(No such file or directory\)"),
    ],
)
def test_bad_frequencies_are_refused(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "counts.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        HashConfig(vocabulary_size=3, table="balanced", frequencies=str(path)).build(D, 2)


# --- N-gram hash ------------------------------------------------------------------------------------------------------


def test_ngram_hash_looks_at_that_many_ids() -> None:
    router = make_router(table="ngram", ngram_length=3, top_k=2)
    ids = [1, 2, 3, 4, 9, 2, 3, 4, 2, 4]
    found = experts_of(router, ids)
    assert found[3] == found[7]  # 2 3 4
    assert found[2] != found[6]  # 1 2 3 and 9 2 3
    assert found[9] != found[3]


def test_a_sequence_starts_without_what_stands_before_it() -> None:
    """The same ids give the same experts as second sequence, after padding, and as second document of a sequence."""
    router = make_router(table="ngram", ngram_length=3, top_k=2)
    alone = experts_of(router, [5, 6, 7])
    assert experts_of(router, [1, 2, 3, 5, 6, 7], batch_size=2)[3:] == alone
    mask_T = torch.tensor([0, 0, 1, 1, 1], dtype=torch.bool)
    assert experts_of(router, [8, -100, 5, 6, 7], mask_T=mask_T)[2:] == alone
    position_T = torch.tensor([0, 1, 2, 0, 1, 2])
    assert experts_of(router, [1, 2, 3, 5, 6, 7], position_T=position_T)[3:] == alone
    assert experts_of(router, [1, 2, 3, 5, 6, 7])[3:] != alone


def test_ngram_is_not_servable_and_the_others_are() -> None:
    assert "earlier tokens" in str(HashConfig(vocabulary_size=V, table="ngram").unservable)
    assert HashConfig(vocabulary_size=V).unservable is None


# --- Learned weights --------------------------------------------------------------------------------------------------


def test_stored_table_with_scores_is_deepseek_v4() -> None:
    torch.manual_seed(0)
    config = DeepseekV4Config(hidden_size=D, vocab_size=20, num_experts_per_tok=3, routed_scaling_factor=1.5)
    config.num_local_experts = N
    stock = DeepseekV4HashRouter(config)
    torch.nn.init.normal_(stock.weight)
    stock.tid2eid.copy_(torch.stack([torch.randperm(N)[:3] for _ in range(20)]))
    ours = HashConfig(
        vocabulary_size=20,
        top_k=3,
        table="stored",
        weights="scores",
        score_function="sqrt_softplus",
        normalize_top_k=True,
        normalization_epsilon=1e-20,
        scaling_factor=1.5,
    ).build(D, N)
    ours.load_state_dict(stock.state_dict())
    x_TD, ids_T = torch.randn(30, D), torch.randint(20, (30,))
    logits_TN, weight_TK, index_TK = stock(x_TD, ids_T)
    routing = ours(x_TD, RoutingContext(token_ids_T=ids_T))
    assert torch.equal(routing.index_TK, index_TK)
    torch.testing.assert_close(routing.weight_TK, weight_TK)
    torch.testing.assert_close(routing.logits_TN, logits_TN)


def test_stored_table_is_random_at_first() -> None:
    assert experts_of(make_router(table="stored", top_k=2), range(50)) == experts_of(make_router(top_k=2), range(50))


def test_scores_have_the_gradients_of_finite_differences() -> None:
    router = make_router(top_k=2, weights="scores", normalize_top_k=True)
    torch.nn.init.normal_(router.weight, generator=torch.Generator().manual_seed(0))  # type: ignore[arg-type]
    context = RoutingContext(token_ids_T=torch.arange(5))
    x_TD = torch.randn(5, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x_TD: router(x_TD, context).weight_TK, x_TD)


# --- Domains (arXiv 2303.10845) ---------------------------------------------------------------------------------------


def test_domain_chooses_the_group_and_the_hash_the_expert_in_it() -> None:
    router = make_router(num_domains=4)
    ids = [3, 14, 15, 92] * 3
    context: dict[str, Tensor | int] = {"batch_size": 3, "task_B": torch.tensor([0, 3, 1])}
    found = torch.tensor(experts_of(router, ids, **context)).view(3, 4)
    assert (found // 2).tolist() == [[0] * 4, [3] * 4, [1] * 4]
    assert torch.equal(found[0] % 2, found[1] % 2)
    assert set(torch.tensor(experts_of(router, range(50), task_B=torch.tensor([2]))).flatten().tolist()) == {4, 5}


# --- Refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"top_k": 9}, r"top_k = 9 is larger than num_experts \(8\)"),
        ({"top_k": 3, "num_domains": 4}, r"top_k = 3 is larger than num_experts / num_domains \(2\); choose 1 to 2"),
        ({"num_domains": 3}, r"num_domains = 3 does not divide num_experts \(8\); choose from \[1, 2, 4, 8\]"),
        ({"table": "balanced"}, r"frequencies = None is missing, and a balanced table needs counts"),
        ({"frequencies": "zipf"}, r"frequencies = 'zipf' has no effect without table: balanced"),
        ({"ngram_length": 3}, r"ngram_length = 3 has no effect without table: ngram"),
        ({"table": "ngram", "ngram_length": 1}, r"ngram_length"),
        ({"score_function": "sigmoid"}, r"score_function = 'sigmoid' has no effect without weights: scores"),
        ({"normalize_top_k": True}, r"normalize_top_k = True has no effect without weights: scores"),
        (
            {"weights": "scores", "normalization_epsilon": 1.0},
            r"normalization_epsilon = 1.0 has no effect without normalize_top_k: true",
        ),
    ],
)
def test_bad_config_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_router(**fields)


def test_ids_out_of_range_are_refused_unless_they_are_padding() -> None:
    router = make_router()
    for token in (V, -100):
        with pytest.raises(ConfigError, match=rf"token_ids = {token} is not in \[0, {V}\); .* vocabulary_size"):
            experts_of(router, [1, token])
        experts_of(router, [1, token], mask_T=torch.tensor([True, False]))
    with pytest.raises(ConfigError, match=r"task = 4 is not in \[0, 4\); .* num_domains"):
        experts_of(make_router(num_domains=4), [1], task_B=torch.tensor([4]))


def test_frequencies_go_with_a_balanced_table_only() -> None:
    with pytest.raises(ConfigError, match=r"table = 'random' takes no frequencies"):
        make_router().set_frequencies([1.0] * V)
    with pytest.raises(ConfigError, match=r"counts_V = '3 values' is not a list"):
        make_router(table="balanced", frequencies="zipf").set_frequencies([1.0] * 3)
