from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tests.trace.models import LAYERS, tiny_model

from moesaic.errors import TraceError
from moesaic.trace import LayerFacts, Rows, TokenColumns, TraceFile, TraceHeader, TraceWriter, record
from moesaic.trace.rows import NOTHING
from moesaic.trace.storage.parquet import HEADER_KEY

HEADER = TraceHeader(
    model="m",
    vocab_size=100,
    layers={3: LayerFacts(num_experts=4, top_k=2), 5: LayerFacts(num_experts=4, top_k=2, num_null=1)},
    domains=("", "code"),
)


def tokens(count: int, first: int = 0) -> TokenColumns:
    at = torch.arange(first, first + count)
    return TokenColumns(
        document_T=at // 3 + 2**40,
        position_T=(at % 3).int(),
        place_T=at.int(),
        token_T=(at * 7 % 100).int(),
        domain_T=(at % 2).short(),
        turn_T=torch.full((count,), NOTHING, dtype=torch.int16),
        modality_T=(at % 2).to(torch.int8),
    )


def rows(layer: int, count: int = 5, *, first: int = 0, dropped: bool = False) -> Rows:
    torch.manual_seed(layer + first)
    choice_TK = torch.rand(count, 4).argsort(-1)[:, :2].short()
    if layer == 5:
        choice_TK[0, 0], choice_TK[1, 1] = 4, NOTHING
    weight_TK = torch.rand(count, 2).masked_fill(choice_TK < 0, 0)
    dropped_TK = (torch.rand(count, 2) < 0.5) & (choice_TK >= 0) if dropped else None
    return Rows(layer, tokens(count, first), choice_TK, weight_TK, dropped_TK)


def write(path: Path, *batches: Rows, header: TraceHeader = HEADER, **options: object) -> TraceFile:
    with TraceWriter(path, header, **options) as writer:  # type: ignore[arg-type]
        for batch in batches:
            writer.write(batch)
    return TraceFile(path)


def assert_same(found: list[Rows], expected: list[Rows]) -> None:
    """The same rows of every layer in the same order, however they are cut into batches."""
    for layer in {batch.layer for batch in expected}:
        parts, wanted = ([batch for batch in batches if batch.layer == layer] for batches in (found, expected))
        for name in ("document_T", "position_T", "place_T", "token_T", "domain_T", "turn_T", "modality_T"):
            read, written = (torch.cat([getattr(batch.tokens, name) for batch in each]) for each in (parts, wanted))
            assert torch.equal(read, written), name
            assert read.dtype == written.dtype
        for name in ("choice_TK", "weight_TK", "dropped_TK", "scores_TM"):
            if all(getattr(batch, name) is None for batch in wanted):
                assert all(getattr(batch, name) is None for batch in parts)
                continue
            read, written = (torch.cat([getattr(batch, name) for batch in each]) for each in (parts, wanted))
            assert torch.equal(read, written.to(read.dtype)), name


def test_rows_come_back_as_they_were(tmp_path):
    batches = [rows(3), rows(5, dropped=True), rows(3, 4, first=5), rows(5, 4, first=5, dropped=True)]
    trace = write(tmp_path / "a.trace", *batches)
    assert len(trace) == 18
    assert trace.header == HEADER
    assert_same(list(trace.rows()), batches)
    assert [path.name for path in (tmp_path / "a.trace").iterdir()] == ["part-000-00000.parquet"]


def test_scores_are_kept_where_they_were_asked_for(tmp_path):
    batch = replace(rows(3), scores_TM=torch.rand(5, 4))
    trace = write(tmp_path / "a", batch, header=HEADER.model_copy(update={"has_scores": True}))
    assert_same(list(trace.rows()), [batch])
    assert next(trace.rows(scores=False)).scores_TM is None


def test_lists_hold_what_was_selected_and_nothing_else(tmp_path):
    write(tmp_path / "a", rows(5, dropped=True), rows(3))
    # As pandas and other readers see it.
    frame = pq.read_table(tmp_path / "a").to_pandas()
    nulls = frame[frame.layer == 5]
    assert [len(choice) for choice in nulls.choice] == [2, 1, 2, 2, 2]
    assert nulls.choice.iloc[0][0] == 4
    assert [len(weight) for weight in nulls.weight] == [len(drops) for drops in nulls.dropped] == [2, 1, 2, 2, 2]
    assert frame[frame.layer == 3].dropped.isna().all()
    assert set(frame.domain) == {"", "code"}
    header = json.loads(pq.read_metadata(tmp_path / "a" / "part-000-00000.parquet").metadata[HEADER_KEY])
    assert TraceHeader.from_dict(header) == HEADER


def test_one_layer_is_read_without_the_others(tmp_path, monkeypatch):
    trace = write(tmp_path / "a", rows(3), rows(5), rows(3, first=5))
    read = []
    original = pq.ParquetFile.read_row_group

    def counted(self: pq.ParquetFile, group: int, **options: object) -> pa.Table:
        read.append(self.metadata.row_group(group).num_rows)
        return original(self, group, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted)
    assert [len(batch) for batch in trace.rows({3})] == [10]
    assert read == [10]
    assert not list(trace.rows({4}))
    assert read == [10]


def test_weights_can_be_left_unread(tmp_path):
    trace = write(tmp_path / "a", rows(5))
    batch = next(trace.rows(weights=False))
    assert torch.equal(batch.choice_TK, rows(5).choice_TK.int())
    assert batch.weight_TK.shape == batch.choice_TK.shape
    assert batch.weight_TK.isnan().all()


def test_parts_of_several_processes_and_of_an_appended_run_are_one_trace(tmp_path):
    write(tmp_path / "a", rows(3))
    write(tmp_path / "a", rows(3, first=5), rank=1, append=True)
    named = HEADER.model_copy(update={"domains": ("", "prose", "code")})
    trace = write(tmp_path / "a", rows(3, first=10), header=named, append=True)
    assert [part.path.name for part in trace.parts] == [
        "part-000-00000.parquet",
        "part-000-00001.parquet",
        "part-001-00000.parquet",
    ]
    assert trace.header.domains == ("", "code", "prose")
    found = list(trace.rows())
    # Domains are known by their names: 1 was prose in the second run.
    assert found[1].tokens.domain_T.tolist() == [{0: 0, 1: 2}[n] for n in rows(3, first=10).tokens.domain_T.tolist()]
    assert_same([found[0], found[2]], [rows(3), rows(3, first=5)])


def test_large_parts_are_finished_and_the_next_begun(tmp_path, monkeypatch):
    monkeypatch.setattr("moesaic.trace.storage.writer._BUFFERED_BYTES", 1)
    batches = [rows(3, first=5 * index) for index in range(3)]
    trace = write(tmp_path / "a", *batches, part_bytes=1)
    assert [part.facts.rows for part in trace.parts] == [5, 5, 5]
    assert_same(list(trace.rows()), batches)


def test_wider_selections_than_expected_widen_the_header(tmp_path):
    wide = replace(rows(3), choice_TK=torch.tensor([[0, 1, 2]] * 5), weight_TK=torch.ones(5, 3))
    trace = write(tmp_path / "a", rows(3), wide)
    assert trace.header.layers[3].top_k == 3
    (batch,) = trace.rows()
    assert batch.choice_TK[:5, 2].tolist() == [NOTHING] * 5


def test_an_interrupted_run_leaves_whole_parts(tmp_path):
    def interrupted() -> None:
        with TraceWriter(tmp_path / "a", HEADER) as writer:
            writer.write(rows(3))
            writer.finish_part()
            writer.write(rows(3, first=5))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert_same(list(TraceFile(tmp_path / "a").rows()), [rows(3), rows(3, first=5)])
    # What a killed process leaves is no part.
    (tmp_path / "a" / ".part-000-00002.parquet.x.tmp").write_bytes(b"PAR1")
    assert len(TraceFile(tmp_path / "a")) == 10


def test_an_error_of_the_thread_reaches_the_caller(tmp_path):
    target = tmp_path / "a"
    target.mkdir()
    writer = TraceWriter(target, HEADER)
    target.rmdir()
    target.write_text("in the way")
    writer.write(rows(3))
    with pytest.raises(TraceError, match="cannot write the trace"):
        writer.finish_part()
    with pytest.raises(TraceError, match="cannot write the trace"):
        writer.write(rows(3))
    with pytest.raises(TraceError, match="cannot write the trace"):
        writer.close()


def test_an_error_in_making_rows_reaches_the_caller(tmp_path):
    def fail() -> list[Rows]:
        raise ZeroDivisionError

    writer = TraceWriter(tmp_path / "a", HEADER)
    writer.write(rows(3))
    writer.finish_part()
    writer.write_later(fail)
    with pytest.raises(ZeroDivisionError):
        writer.close()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["part-000-00000.parquet"]


def test_a_trace_is_not_overwritten(tmp_path):
    write(tmp_path / "a", rows(3))
    with pytest.raises(TraceError, match="append=True"):
        TraceWriter(tmp_path / "a", HEADER)
    other = HEADER.model_copy(update={"vocab_size": 7})
    with pytest.raises(TraceError, match="vocab_size is 100 there and 7 here"):
        TraceWriter(tmp_path / "a", other, append=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(TraceError, match="is a file"):
        TraceWriter(tmp_path / "file", HEADER)


def test_what_is_no_trace_is_named(tmp_path):
    with pytest.raises(TraceError, match=r"nowhere is not a trace: it does not exist"):
        TraceFile(tmp_path / "nowhere")
    with pytest.raises(TraceError, match=r"has no part-\*\.parquet"):
        TraceFile(tmp_path)
    pq.write_table(pa.table({"a": [1]}), tmp_path / "part-000-00000.parquet")
    with pytest.raises(TraceError, match="was not written by moesaic"):
        TraceFile(tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_part_cut_short_is_named(tmp_path, share):
    write(tmp_path / "a", rows(3))
    part = tmp_path / "a" / "part-000-00000.parquet"
    content = part.read_bytes()
    part.write_bytes(content[: int(share * len(content))])
    with pytest.raises(TraceError, match=r"part-000-00000\.parquet is damaged or cut short"):
        TraceFile(tmp_path / "a")


def test_bytes_that_changed_are_noticed(tmp_path):
    trace = write(tmp_path / "a", *(rows(3, first=5 * index) for index in range(100)))
    part = trace.parts[0].path
    content = bytearray(part.read_bytes())
    column = trace.parts[0].metadata.row_group(0).column(9)
    content[column.data_page_offset + column.total_compressed_size // 2] ^= 255
    part.write_bytes(content)
    with pytest.raises(TraceError, match="is damaged"):
        list(TraceFile(tmp_path / "a").rows())


def test_a_newer_version_and_foreign_parts_are_named(tmp_path):
    newer = HEADER.model_copy(update={"version": 2})
    with TraceWriter(tmp_path / "new", newer) as writer:
        writer.write(rows(3))
    with pytest.raises(TraceError, match="version 2 of the trace format and this moesaic reads up to 1"):
        TraceFile(tmp_path / "new")
    write(tmp_path / "a", rows(3))
    layers = {3: LayerFacts(num_experts=8, top_k=2)}
    write(tmp_path / "b", rows(3), header=HEADER.model_copy(update={"layers": layers}), rank=1)
    (tmp_path / "b" / "part-001-00000.parquet").rename(tmp_path / "a" / "part-001-00000.parquet")
    with pytest.raises(TraceError, match=r"different traces: layers\.3\.num_experts is 4 and 8"):
        TraceFile(tmp_path / "a")


def test_fields_that_later_versions_add_are_ignored(tmp_path):
    class Later(TraceHeader):
        mood: str = "good"

    trace = write(tmp_path / "a", rows(3), header=Later(**dict(HEADER)))
    assert trace.header == HEADER


def test_a_trace_of_another_model_or_tokenizer_is_named(tmp_path):
    class Tokenizer:
        name_or_path = "mine"

        def __init__(self, *words: str) -> None:
            self._words = words

        def get_vocab(self) -> dict[str, int]:
            return {word: index for index, word in enumerate(self._words)}

    model = tiny_model()
    with record(model, tmp_path / "a", tokenizer=Tokenizer("a", "b")) as trace:
        model(torch.arange(6).view(1, 6))
    trace = TraceFile(tmp_path / "a")
    trace.check_model(model)
    trace.check_tokenizer(Tokenizer("a", "b"))
    with pytest.raises(TraceError, match=r"another tokenizer: its fingerprint is .* for mine"):
        trace.check_tokenizer(Tokenizer("b", "a"))
    more = tiny_model(experts={"num_experts": 8, "intermediate_size": 16})
    with pytest.raises(TraceError, match=r"num_experts of layer 1 is 6 in the trace of .* and 8 in"):
        trace.check_model(more)
    with pytest.raises(TraceError, match=rf"list of MoE layers is \[{LAYERS[0]}, {LAYERS[1]}\]"):
        trace.check_model(tiny_model(layers={"first_dense": 2}))
    with pytest.raises(TraceError, match="vocab_size is 50"):
        trace.check_model(tiny_model({"vocab_size": 51}))
