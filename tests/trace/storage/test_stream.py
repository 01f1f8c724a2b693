from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tests.trace.models import tiny_model
from tests.trace.storage.test_file import assert_same

from moesaic.errors import ConfigError, TraceError
from moesaic.trace import Rows, TraceFile, record

IDS = torch.arange(1, 21).view(2, 10)  # 0 is padding where a model generates


def by_layer(rows: list[Rows], layer: int) -> list[Rows]:
    return [batch for batch in rows if batch.layer == layer]


def test_a_trace_on_disk_holds_what_one_in_memory_holds(tmp_path):
    model = tiny_model()
    mask = torch.ones_like(IDS)
    mask[0, :4] = 0
    with record(model) as memory, record(model, tmp_path / "a.trace") as disk:
        for trace in (memory, disk):
            with trace.domain("code"), trace.turn(2):
                pass
        with memory.domain("code"), disk.domain("code"), memory.turn(2), disk.turn(2):
            model(IDS, attention_mask=mask)
        model(IDS + 20, position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]] * 2))
        model.generate(IDS[:1], max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0)
    assert disk.num_tokens == memory.num_tokens == 16 + 20 + 12
    trace = TraceFile(tmp_path / "a.trace")
    assert trace.header == memory.header == disk.header
    assert trace.header.domains == ("", "code")
    assert_same(list(trace.rows()), list(memory.rows()))
    assert set(next(trace.rows()).tokens.turn_T.tolist()) == {2, -1}


@pytest.mark.parametrize(
    "spec",
    [
        {"router": {"type": "null_experts", "top_k": 3, "num_null": 4}},
        {"capacity": {"factor": 0.6}},
        {"router": {"type": "expert_choice", "capacity_factor": 1.5}},
        {"depth": {"capacity": 0.5}},
        {"router": {"type": "threshold"}},
    ],
    ids=["null_experts", "capacity", "expert_choice", "depth", "threshold"],
)
def test_mechanisms_come_back_as_they_were(tmp_path, spec):
    model = tiny_model(**spec)
    with record(model, scores=True) as memory, record(model, tmp_path / "a", scores=True):
        model(IDS)
        model(IDS[:, :3])
    trace = TraceFile(tmp_path / "a")
    found, expected = list(trace.rows()), list(memory.rows())
    assert {layer: facts.model_copy(update={"top_k": 1}) for layer, facts in trace.header.layers.items()} == {
        layer: facts.model_copy(update={"top_k": 1}) for layer, facts in memory.header.layers.items()
    }
    for layer, facts in trace.header.layers.items():
        read, written = by_layer(found, layer), by_layer(expected, layer)
        index_TK = torch.cat([rows.index_TK(facts.num_experts) for rows in read])
        memory_TK = F.pad(
            memory.layers[layer].index_TK, (0, facts.top_k - memory.layers[layer].top_k), value=facts.num_experts
        )
        assert torch.equal(index_TK.sort(-1).values, memory_TK.sort(-1).values)
        assert torch.equal(
            index_TK.flatten().bincount(minlength=facts.num_experts + 1)[: facts.num_experts],
            memory.layers[layer].load_N,
        )
        assert torch.equal(
            torch.cat([rows.scores_TM for rows in read]), torch.cat([rows.scores_TM for rows in written])
        )
        dropped = sum(int(rows.dropped_TK.sum()) for rows in read if rows.dropped_TK is not None)
        assert dropped == memory.layers[layer].dropped


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_under_checkpointing_is_written_once(tmp_path, reentrant):
    model = tiny_model().train()
    with record(model, tmp_path / "plain"):
        model(IDS, labels=IDS).loss.backward()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    with record(model, tmp_path / "again"):
        model(IDS, labels=IDS).loss.backward()
    assert_same(list(TraceFile(tmp_path / "again").rows()), list(TraceFile(tmp_path / "plain").rows()))


@pytest.mark.parametrize("router", [{"type": "soft_slots"}, {"type": "merged"}])
def test_layers_in_which_tokens_select_nothing_are_said_to_have_none(tmp_path, router):
    model = tiny_model(router=router)
    with record(model) as memory, record(model, tmp_path / "a"):
        model(IDS)
    trace = TraceFile(tmp_path / "a")
    assert not any(facts.selects for facts in trace.header.layers.values())
    assert not any(facts.selects for facts in memory.header.layers.values())
    assert not list(trace.rows())
    assert not list(memory.rows())


def test_a_sample_holds_whole_documents_the_same_in_memory_and_on_disk(tmp_path):
    model = tiny_model()
    position = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 0, 1]] * 2)
    with (
        record(model) as full,
        record(model, sample=0.4) as memory,
        record(model, tmp_path / "a", sample=0.4),
        record(model, sample=0.4, seed=1) as other,
        record(model, sample=0.4, keep="counts") as counts,
    ):
        for start in range(0, 20, 2):
            model(IDS + start, position_ids=position)
    trace = TraceFile(tmp_path / "a")
    assert trace.header.sample == 0.4
    assert_same(list(trace.rows()), list(memory.rows()))
    sizes, sampled = (
        torch.cat([rows.tokens.document_T for rows in each.rows({1})]).bincount(minlength=60) for each in (full, memory)
    )
    kept = sampled > 0
    assert torch.equal(sampled[kept], sizes[kept])
    assert 12 < int(kept.sum()) < 36
    assert memory.num_tokens == int(sampled.sum()) == counts.num_tokens
    assert torch.equal(counts.layers[2].load_N, memory.layers[2].load_N)
    others = torch.cat([rows.tokens.document_T for rows in other.rows({1})]).bincount(minlength=60) > 0
    assert not torch.equal(others, kept)


def test_turns_of_tokens_go_on_with_what_is_generated(tmp_path):
    model = tiny_model()
    turns = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2, 2]])
    with record(model, tmp_path / "a") as trace, trace.turn(turns):
        model.generate(IDS[:1], max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0)
        with pytest.raises(ConfigError, match=r"turn = \(1, 10\) is not the shape of the ids"):
            model(IDS[:, :4])
    (rows,) = TraceFile(tmp_path / "a").rows({1})
    assert rows.tokens.turn_T.tolist() == [*turns[0].tolist(), 2, 2]
    assert rows.tokens.document_T.unique().tolist() == [0]


def test_rows_can_be_read_while_recording_goes_on(tmp_path):
    model = tiny_model()
    with record(model, tmp_path / "a") as trace:
        model(IDS)
        assert [len(rows) for rows in trace.rows({1})] == [20]
        model(IDS)
        assert sum(len(rows) for rows in trace.rows({1})) == 40
    assert sum(len(rows) for rows in trace.rows({2})) == 40


def test_appended_documents_are_new_ones(tmp_path):
    model = tiny_model()
    with record(model, tmp_path / "a"):
        model(IDS)
    with pytest.raises(TraceError, match="append=True"), record(model, tmp_path / "a"):
        pass
    with record(model, tmp_path / "a", append=True):
        model(IDS)
    with record(model, tmp_path / "a", append=True, rank=2):
        model(IDS[:1])
    documents = torch.cat([rows.tokens.document_T for rows in TraceFile(tmp_path / "a").rows({1})])
    assert documents.unique().tolist() == [0, 1, 2, 3, 2 * 2**40]


def test_an_error_in_the_block_is_what_the_caller_sees(tmp_path):
    model = tiny_model()

    def fails() -> None:
        with record(model, tmp_path / "a"):
            model(IDS)
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fails()
    assert len(TraceFile(tmp_path / "a")) == 40


def test_counts_have_nothing_to_write(tmp_path):
    with pytest.raises(ConfigError, match="keep"), record(tiny_model(), tmp_path / "a", keep="counts"):
        pass
    with pytest.raises(ConfigError, match="sample = 0"), record(tiny_model(), tmp_path / "a", sample=0):
        pass
    assert not (tmp_path / "a").exists()
