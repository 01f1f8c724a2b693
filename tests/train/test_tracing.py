from __future__ import annotations

from collections import Counter

import pyarrow as pa
import pytest
import torch
from tests.train.builders import DOMAINS, tiny_run
from tests.train.test_hf_trainer import moe_model, run_trainer, sequences, stock_mixtral

from moesaic.errors import ConfigError, TraceError, UnsupportedModel
from moesaic.trace import TraceFile
from moesaic.trace.storage.parts import remove_steps_after
from moesaic.train import TraceCallback, Trainer, train

TOKENS = 4 * 32  # of a step


def table_of(trace: TraceFile) -> pa.Table:
    return pa.concat_tables(trace.tables()).unify_dictionaries()


def rows_by_step(trace: TraceFile) -> dict[int, int]:
    return dict(sorted(Counter(table_of(trace)["step"].to_pylist()).items()))


def test_a_run_traces_its_training_steps_and_nothing_else(data, tmp_path):
    run = tiny_run(data.config, trace={"sample": 1.0, "every_steps": 3}, accumulation_steps=2)
    train(run, tmp_path / "out", data=data, progress=False)
    trace = TraceFile(tmp_path / "out" / "routing.trace")
    layers = len(trace.header.layers)
    assert rows_by_step(trace) == dict.fromkeys((1, 4, 7), 2 * TOKENS * layers)
    assert set(trace.header.domains) == {"", *DOMAINS}
    trace.check_tokenizer(data.tokenizer)
    # The tokens, documents and domains are those of the batches.
    batches = data.train_batches()
    first = [next(batches) for _ in range(2)]
    layer = min(trace.header.layers)
    table = table_of(trace).filter(pa.compute.equal(table_of(trace)["layer"], layer)).slice(0, 2 * TOKENS)
    ids, domains, documents = (
        torch.cat([batch[name].flatten() for batch in first]) for name in ("input_ids", "domain_ids", "document_ids")
    )
    assert table["token"].to_pylist() == ids.tolist()
    assert table["domain"].to_pylist() == [data.summary.domains[index] for index in domains.tolist()]
    same = torch.tensor(table["document"].to_pylist())
    inside = torch.arange(1, 2 * TOKENS) % 32 != 0
    assert torch.equal((same[1:] == same[:-1])[inside], (documents[1:] == documents[:-1])[inside])


def test_tracing_changes_no_number(data, make_trainer, tmp_path):
    plain = make_trainer(tiny_run(data.config)).train_step()
    trainer = make_trainer(tiny_run(data.config, trace={}))
    with trainer._tracing(tmp_path):
        traced = trainer.train_step()
    assert (traced.loss, traced.gradient_norm) == (plain.loss, plain.gradient_norm)


def test_a_resumed_run_traces_each_step_once(data, tmp_path, monkeypatch):
    run = tiny_run(data.config, trace={"sample": 0.5, "scores": True})
    train(run, tmp_path / "whole", data=data, progress=False)
    step = Trainer.train_step

    def stopped_in_step_7(trainer: Trainer):
        if trainer.step == 6:
            raise InterruptedError
        return step(trainer)

    monkeypatch.setattr(Trainer, "train_step", stopped_in_step_7)
    with pytest.raises(InterruptedError):
        train(run, tmp_path / "killed", data=data, progress=False)
    monkeypatch.undo()
    folder = tmp_path / "killed" / "routing.trace"
    before = rows_by_step(TraceFile(folder))
    assert 4 < max(before) <= 6
    train(run, tmp_path / "killed", resume=True, data=data, progress=False)
    whole, resumed = (table_of(TraceFile(tmp_path / name / "routing.trace")) for name in ("whole", "killed"))
    assert len(whole) > 0
    order = [("layer", "ascending"), ("step", "ascending"), ("document", "ascending"), ("position", "ascending")]
    assert resumed.sort_by(order).equals(whole.sort_by(order))


def test_a_trace_that_cannot_be_cut_is_refused(data, tmp_path):
    run = tiny_run(data.config, trace={}, checkpoint_every=None)
    train(run, tmp_path / "out", data=data, progress=False)
    with pytest.raises(TraceError, match=r"holds steps \d to 8, and the run goes on after step 4"):
        remove_steps_after(tmp_path / "out" / "routing.trace", 4)


def test_what_cannot_be_traced_is_refused_before_text_is_read(data, tmp_path):
    with pytest.raises(UnsupportedModel, match="'llama' is not a known MoE family"):
        train(tiny_run(data.config, moe=False, trace={}), tmp_path / "out", progress=False)
    for path in ("/tmp/elsewhere", "../elsewhere", ""):
        with pytest.raises(ConfigError, match=r"train\.trace\.path = .* is not a folder in the output folder"):
            tiny_run(data.config, trace={"path": path})


def test_a_compiled_model_is_recorded(tmp_path):
    from moesaic.trace import record

    model = moe_model(0.0).eval()
    ids = torch.arange(12).view(1, 12)
    with torch.no_grad(), record(model) as eager:
        model(ids)
    model.compile(backend="eager")
    with torch.no_grad(), record(model, tmp_path / "a"):
        model(ids)
    found = list(TraceFile(tmp_path / "a").rows())
    assert [rows.choice_TK.tolist() for rows in found] == [rows.choice_TK.tolist() for rows in eager.rows()]


@pytest.mark.parametrize("make", [moe_model, stock_mixtral])
def test_hf_trainer_traces_its_training_steps(tmp_path, make):
    data = sequences(4, equal=False)
    settings = {"eval_strategy": "steps", "eval_steps": 1}
    callback = TraceCallback(sample=1.0, every_steps=2)
    run_trainer(make(0.01), data, tmp_path, [callback], batch_size=2, steps=3, **settings)
    trace = TraceFile(tmp_path / "routing.trace")
    layers = len(trace.header.layers)
    assert rows_by_step(trace) == dict.fromkeys((1, 3), 4 * 16 * layers)


def test_a_resumed_hf_training_traces_each_step_once(tmp_path):
    data = sequences(4, equal=False)
    settings = {"save_strategy": "steps", "save_steps": 2}
    trainer = run_trainer(
        moe_model(0.01), data, tmp_path, [TraceCallback(sample=1.0)], batch_size=4, steps=3, **settings
    )
    assert sorted(rows_by_step(TraceFile(tmp_path / "routing.trace"))) == [1, 2, 3]
    trainer.args.max_steps = 4
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    trace = TraceFile(tmp_path / "routing.trace")
    assert rows_by_step(trace) == dict.fromkeys((1, 2, 3, 4), 4 * 16 * len(trace.header.layers))
