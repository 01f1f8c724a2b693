from __future__ import annotations

import json

from moesaic.trace import TraceFile


def test_eval_writes_the_routing_of_what_it_reads(cli, trained, tmp_path):
    (tmp_path / "a.txt").write_text("def read(path):\n    return path\n" * 40)
    (tmp_path / "b.txt").write_text("It reads what is there, and no more. " * 40)
    texts = ["--text", f"code={tmp_path / 'a.txt'}", "--text", f"prose={tmp_path / 'b.txt'}"]
    ended = cli("eval", trained, *texts, "--trace", tmp_path / "x.trace", "--json")
    assert ended.code == 0, ended.err
    report = json.loads(ended.out)
    plain = json.loads(cli("eval", trained, *texts, "--json").out)
    assert plain["domains"] == report["domains"]
    trace = TraceFile(tmp_path / "x.trace")
    assert trace.header.domains == ("", "code", "prose")
    assert len(trace) == report["trace"]["tokens"] * len(trace.header.layers)
    # The first token of a sequence is not predicted, and padding is not traced.
    sequences = sum(int((rows.tokens.place_T == 0).sum()) for rows in trace.rows({1}))
    assert report["trace"]["tokens"] == report["overall"]["tokens"] + sequences

    ended = cli("eval", trained, *texts, "--trace", tmp_path / "x.trace")
    assert ended.code == 2
    assert "there is a trace in" in ended.err


def test_generate_writes_the_routing_of_prompt_and_continuation(cli, trained, tmp_path):
    options = ["-p", "def read", "--max-new-tokens", 5, "--temperature", 0, "--json"]
    ended = cli("generate", trained, *options, "--trace", tmp_path / "x.trace")
    assert ended.code == 0, ended.err
    report = json.loads(ended.out)
    assert report["text"] == json.loads(cli("generate", trained, *options).out)["text"]
    (rows,) = TraceFile(tmp_path / "x.trace").rows({0})
    assert len(rows) == report["trace"]["tokens"]
    assert rows.tokens.document_T.tolist() == [0] * len(rows)
    assert rows.tokens.position_T.tolist() == list(range(len(rows)))


def test_trace_prints_what_a_trace_is_of(cli, trained, tmp_path):
    cli("generate", trained, "-p", "def", "--max-new-tokens", 3, "--trace", tmp_path / "x.trace", "--json")
    ended = cli("trace", tmp_path / "x.trace", "--check", "--json")
    report = json.loads(ended.out)
    assert report["rows"] == report["rows_read"] == len(TraceFile(tmp_path / "x.trace"))
    assert report["layers"]["0"]["num_experts"] == 8
    assert report["processes"] == 1
    assert report["last_step"] is None
    text = cli("trace", tmp_path / "x.trace")
    assert text.code == 0
    assert "top_k" in text.out
    ended = cli("trace", tmp_path)
    assert ended.code == 2
    assert "is not a trace" in ended.err
