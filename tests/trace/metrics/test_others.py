"""Similarity of experts, null experts by frequency, bootstrap, results and files of counts."""

from __future__ import annotations

import csv
import json

import pytest
import torch
from tests.trace.models import tiny_model
from tests.trace.routing_logs import R_PICKS, columns, log_of, random_log, same_counts, table_r

from moesaic.errors import ConfigError, TraceError
from moesaic.layer import LoadBalancing, Routing, RoutingContext, ZLoss
from moesaic.trace import (
    bootstrap,
    count,
    count_blocks,
    drop_rates,
    expert_outputs,
    expert_similarity,
    experts_by_frequency,
    hidden_states,
    layer_flow,
    load_balance,
    load_counts,
    nulls_by_frequency,
    output_similarity,
    routing_deviation,
    save_counts,
    summarise,
    weight_similarity,
)
from moesaic.trace.counts.routing import TABLES


def test_nulls_of_the_worked_example_of_adamoe():
    """Three experts, two nulls, three picks of four tokens: f = (.5, .75, .5, .75, .5), load 7/4."""
    choice_TK = torch.tensor([[0, 1, 3], [1, 2, 3], [0, 1, 4], [2, 3, 4]])
    layer = count(log_of(columns([8, 8, 8, 9]), {0: choice_TK}, 3, num_null=2)).layer(0)
    assert (layer.chosen_M / 4).tolist() == [0.5, 0.75, 0.5, 0.75, 0.5]
    found = nulls_by_frequency(layer, buckets=4)
    assert found.value == pytest.approx(5 / 12)
    assert found.reference == 2 / 5
    assert found.values["experts_per_token"] == 7 / 4
    assert found.rows() == [
        {"label": 0, "least": 1, "most": 1, "count": 1, "value": pytest.approx(2 / 3), "experts": 1.0},
        {"label": 1, "least": 3, "most": 3, "count": 3, "value": pytest.approx(1 / 3), "experts": 2.0},
    ]
    assert load_balance(layer).values["null_share"] == pytest.approx(5 / 12)
    assert layer.ran_K1.tolist() == [0, 1, 3, 0]
    assert layer.unserved == 0


def test_buckets_of_ids_hold_about_as_many_tokens():
    ids_T = torch.cat([torch.full((size,), size) for size in (1, 2, 3, 4, 10, 20)])
    layer = count(log_of(columns(ids_T), {0: torch.zeros(40, 1).long()}, 2, num_null=1)).layer(0)
    found = nulls_by_frequency(layer, buckets=4)
    assert found.table["count"].sum() == 40
    assert found.table["least"].tolist() == [1, 10, 20]
    assert found.table["most"].tolist() == [4, 10, 20]
    rows = experts_by_frequency(torch.zeros(40, 1).long(), ids_T, 2, buckets=4)
    assert [(row.least, row.most, row.tokens, row.experts) for row in rows] == [
        (row["least"], row["most"], row["count"], row["experts"]) for row in found.rows()
    ]


def test_weight_similarity():
    generator = torch.Generator().manual_seed(0)
    gate_up, down = torch.randn(3, 8, 5, generator=generator), torch.randn(3, 5, 4, generator=generator)
    gate_up[1], down[1] = gate_up[0], down[0]
    for over in ("mean", "all"):
        found = weight_similarity(gate_up, down, over=over)
        assert found.matrix_GM[0, 1].item() == pytest.approx(1)
        assert abs(found.matrix_GM[0, 2].item()) < 0.7
        assert found.table["partner"].tolist()[:2] == [1, 0]
    # Mean over all pairs with themselves, times the three pieces of length 1, is the number of RMoE.
    mean_NN = weight_similarity(gate_up, down).matrix_GM.nan_to_num(1.0)
    assert 3 * mean_NN.mean().item() == pytest.approx(expert_similarity(gate_up, down))
    # The order of hidden units does not matter to the mean.
    order = torch.tensor([2, 0, 3, 1])
    moved = gate_up.clone()
    moved[1] = torch.cat([gate_up[1][:4][order], gate_up[1][4:][order]])
    assert weight_similarity(moved, down).matrix_GM[0, 1].item() == pytest.approx(1)
    assert weight_similarity(moved, down, over="all").matrix_GM[0, 1].item() < 0.9


def test_output_similarity():
    generator = torch.Generator().manual_seed(0)
    y_TD = torch.randn(400, 6, generator=generator)
    rotation_DD = torch.linalg.qr(torch.randn(6, 6, generator=generator)).Q
    y_NTD = torch.stack([y_TD, 3 * y_TD, y_TD @ rotation_DD, torch.randn(400, 6, generator=generator), 0 * y_TD])
    cosine, cka = (output_similarity(y_NTD, measure=measure).matrix_GM for measure in ("cosine", "cka"))
    assert cosine[0, 1].item() == pytest.approx(1)
    assert abs(cosine[0, 2].item()) < 0.6
    assert abs(cosine[0, 3].item()) < 0.1
    assert [cka[0, 1].item(), cka[0, 2].item()] == pytest.approx([1, 1], abs=1e-6)
    assert cka[0, 3].item() < 0.1
    assert cosine[4].isnan().all()
    assert cka[4].isnan().all()
    # Against the definition with D x D matrices.
    centred = (y_NTD - y_NTD.mean(1, keepdim=True)).double()
    cross = [(centred[a].T @ centred[b]).norm() for a, b in ((0, 3), (0, 0), (3, 3))]
    assert cka[0, 3].item() == pytest.approx((cross[0] ** 2 / (cross[1] * cross[2])).item())


def test_outputs_of_the_experts_of_a_model():
    model = tiny_model()
    experts = next(module for name, module in model.named_modules() if name.endswith("experts"))
    with torch.no_grad(), hidden_states(experts, 10) as sample:
        model(torch.arange(20).view(2, 10))
    assert sample.x_TD.shape == (10, 32)
    y_NTD = expert_outputs(experts, sample.x_TD)
    gate_TF, up_TF = (sample.x_TD @ experts.gate_up_proj[2].T).chunk(2, dim=-1)
    torch.testing.assert_close(y_NTD[2], (torch.nn.functional.silu(gate_TF) * up_TF) @ experts.down_proj[2].T)
    assert output_similarity(y_NTD).matrix_GM.shape == (6, 6)
    with pytest.raises(ConfigError, match="did not run"), hidden_states(experts) as empty:
        _ = empty.x_TD


def test_flow():
    first, second = torch.tensor([[0], [0], [1], [2]]), torch.tensor([[1], [1], [0], [0]])
    counts = count(log_of(columns([1, 2, 3, 4]), {2: first, 5: second}, 3))
    found = layer_flow(counts, 2, 5)
    assert found.matrix_GM.tolist() == [[0, 2, 0], [1, 0, 0], [1, 0, 0]]
    assert found.value == pytest.approx(1)  # the first layer decides the second
    assert found.table["kept"].tolist() == [0, 0, 0]  # 1.5 * 4 / 3 = 2
    assert layer_flow(counts, 2, 5, least=1.2).table["kept"].tolist() == [1, 0, 0]
    with pytest.raises(ConfigError, match="no counted flow"):
        layer_flow(counts, 5, 2)


def test_bootstrap_of_any_metric():
    log = random_log(0, lengths=(20,) * 40, layers=(1,))
    parts = count_blocks(log, 10, tables=("token",))
    assert len(parts) == 10
    whole = count(log).layer(1)
    joined = parts[0]
    for part in parts[1:]:
        joined = joined + part
    assert torch.equal(joined.layer(1).group("token").table_GM(), whole.group("token").table_GM())
    band = bootstrap(parts, lambda counts: routing_deviation(counts.layer(1)).value, replicates=20)
    # Drawing adds noise, which adds to s: the band lies at or above the value.
    assert band.low < band.high
    assert band.low < 2 * routing_deviation(whole).value
    share = bootstrap(parts, lambda counts: float(counts.layer(1).load_N[0]) / counts.layer(1).tokens, replicates=50)
    assert share.low < float(whole.load_N[0]) / whole.tokens < share.high
    with pytest.raises(ConfigError, match="parts"):
        bootstrap(parts[:1], lambda counts: 0.0)


def test_bands_of_single_documents_are_missing():
    assert load_balance(count(table_r()).layer(0)).band is None
    assert load_balance(count(random_log(0)).layer(1)).band is not None


@pytest.mark.parametrize("num_null", [0, 2])
def test_every_metric_of_every_layer_goes_into_json_and_csv(tmp_path, num_null: int):
    counts = count(random_log(0, drops=True, num_null=num_null, domains=(0, 1, 1)), tables=TABLES)
    found = summarise(counts, min_count=2)
    assert {result.layer for result in found} == {1, 3}
    names = [result.metric for result in found]
    assert "drop_rate_by_turn" in names
    assert ("null_share_by_frequency" in names) == (num_null > 0)
    for result in found:
        text = json.dumps(result.to_dict(), allow_nan=False)
        assert json.loads(text)["metric"] == result.metric
        assert len({len(column) for column in result.table.values()}) == 1
    result = drop_rates(counts.layer(1))
    result.write(tmp_path / "drops.json")
    result.write(tmp_path / "drops.csv")
    assert json.loads((tmp_path / "drops.json").read_text())["value"] == result.value
    rows = list(csv.DictReader((tmp_path / "drops.csv").open()))
    assert [int(row["picks"]) for row in rows] == result.table["picks"].tolist()
    with pytest.raises(ConfigError, match=r"\.json"):
        result.write(tmp_path / "drops.txt")


def test_counts_are_saved_and_read(tmp_path):
    counts = count(random_log(0, drops=True, num_null=1, domains=(0, 1, 1)), tables=TABLES, exclude=[3])
    save_counts(counts, tmp_path / "counts.npz")
    again = load_counts(tmp_path / "counts.npz")
    same_counts(again, counts)
    assert (again.header, again.tables, again.blocks) == (counts.header, counts.tables, counts.blocks)
    assert (again.documents, again.excluded) == (3, frozenset({3}))
    same_counts(again + counts, counts + counts)
    with pytest.raises(ConfigError, match="npz"):
        save_counts(counts, tmp_path / "counts.json")


def test_damaged_files_of_counts_are_named(tmp_path):
    path = tmp_path / "counts.npz"
    with pytest.raises(TraceError, match=r"counts\.npz"):
        load_counts(path)
    save_counts(count(table_r()), path)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(TraceError, match=r"counts\.npz"):
        load_counts(path)


def test_losses_of_the_worked_numbers():
    """z-loss of logits of zero is (log E)^2; the balance loss at uniform scores is 1 for any load, K in the paper's scale."""
    for size, expected in ((4, 1.921812), (32, 12.011325)):
        zero_TN = torch.zeros(8, size, dtype=torch.float64)
        index_TK = torch.tensor(R_PICKS)
        routing = Routing(index_TK, torch.ones(8, 2), zero_TN, zero_TN.softmax(-1), zero_TN)
        assert ZLoss(coefficient=1.0).per_sequence(routing, RoutingContext()).item() == pytest.approx(
            expected, abs=1e-6
        )
        assert LoadBalancing(coefficient=1.0).per_sequence(routing, RoutingContext()).item() == pytest.approx(1)
