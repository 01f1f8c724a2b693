import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from moesaic.data import (
    DataConfig,
    DatasetsSource,
    Document,
    JsonlSource,
    PretrainedTokenizer,
    PythonSource,
    TextSource,
    TrainBPE,
    prepare,
    prepare_data,
    tokenise,
)
from moesaic.data.prepare import PreparedData
from moesaic.data.split import is_validation
from moesaic.data.store import TokenStore
from moesaic.errors import ConfigError, DataError


def changed(config: DataConfig, **changes: object) -> DataConfig:
    return DataConfig.from_dict({**config.to_dict(), **changes})


def entries(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir() if path.is_dir())


def decoded(data: PreparedData, split: str) -> set[str]:
    """Texts of a split, read back from its token files."""
    store = TokenStore(data.folder / split, np.dtype(data.summary.token_dtype))
    pieces = [store.tokens[a : b - 1] for a, b in zip(store.starts[:-1], store.starts[1:], strict=True)]
    return {str(data.tokenizer.decode(piece.tolist())) for piece in pieces}


def test_every_document_is_on_exactly_one_side(config: DataConfig, corpus: Path, tmp_path: Path):
    data = prepare_data(config, tmp_path / "cache", progress=False)
    texts = {json.loads(line)["text"] for line in corpus.read_text().splitlines()}
    train, held_out = decoded(data, "train"), decoded(data, "validation")
    assert train | held_out == texts
    assert not train & held_out
    assert held_out


def test_summary_counts_all(config: DataConfig, corpus: Path, tmp_path: Path):
    data = prepare_data(config, tmp_path / "cache", progress=False)
    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    amounts = [*data.summary.train.values(), *data.summary.validation.values()]
    assert sum(amount.documents for amount in amounts) == 60
    assert sum(amount.bytes for amount in amounts) == sum(len(text.encode()) for text in texts)
    assert data.summary.domains == ("even", "odd")
    assert data.train.num_tokens == sum(amount.tokens for amount in data.summary.train.values())
    for domain, sequences in data.validation.items():
        assert sequences.num_tokens == data.summary.validation[domain].tokens


def test_validation_batches_hold_their_domain_only(config: DataConfig, tmp_path: Path):
    data = prepare_data(config, tmp_path / "cache", progress=False)
    assert set(data.validation) == {"even", "odd"}
    for domain, batches in data.validation_batches(batch_size=3).items():
        index = data.summary.domains.index(domain)
        seen = torch.cat([batch["domain_ids"].flatten() for batch in batches]).unique().tolist()
        assert set(seen) <= {-1, index}
        assert index in seen


def test_a_mixture_takes_domains_by_their_shares(config: DataConfig, tmp_path: Path):
    plain = prepare_data(config, tmp_path / "cache", progress=False)
    mixture = [{"until": 2, "shares": {"odd": 1}}, {"shares": {"odd": 1, "even": 1}}]
    mixed = prepare_data(changed(config, mixture=mixture), tmp_path / "cache", progress=False)
    assert mixed.folder == plain.folder
    batches = mixed.train_batches()
    domains = [next(batches)["domain_ids"] for _ in range(4)]
    assert [batch.unique().tolist() for batch in domains[:2]] == [[1], [1]]
    assert all((batch[:, 0] == 0).sum() == 2 for batch in domains[2:])
    unknown = prepare_data(changed(config, mixture=[{"shares": {"old": 1}}]), tmp_path / "cache", progress=False)
    with pytest.raises(
        ConfigError, match="'old' is no domain with a whole training sequence; these have one: even, odd"
    ):
        unknown.train_batches()


def test_the_same_input_gives_the_same_batches_in_another_cache(config: DataConfig, tmp_path: Path):
    one = prepare_data(config, tmp_path / "one", progress=False).train_batches()
    other = prepare_data(config, tmp_path / "other", progress=False).train_batches()
    for _ in range(20):
        assert torch.equal(next(one)["input_ids"], next(other)["input_ids"])


def test_second_call_reads_the_cache(config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    first = prepare_data(config, tmp_path / "cache", progress=False)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("tokenised again")

    monkeypatch.setattr(prepare, "tokenise", refuse)
    again = changed(config, sequence_length=8, batch_size=2, seed=9, isolate_documents=True)
    second = prepare_data(again, tmp_path / "cache", progress=False)
    assert second.folder == first.folder
    assert second.summary == first.summary
    assert len(second.train) == second.train.num_tokens // 8


def test_a_changed_file_or_setting_makes_a_new_entry(config: DataConfig, corpus: Path, tmp_path: Path):
    cache = tmp_path / "cache"
    prepare_data(config, cache, progress=False)
    prepare_data(changed(config, tokenizer={"type": "train_bpe", "vocab_size": 290}), cache, progress=False)
    with corpus.open("a") as file:
        file.write('{"text": "one more", "kind": "odd"}\n')
    data = prepare_data(config, cache, progress=False)
    assert len(entries(cache)) == 3
    total = [*data.summary.train.values(), *data.summary.validation.values()]
    assert sum(amount.documents for amount in total) == 61


def test_an_interrupted_call_leaves_nothing(config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    cache = tmp_path / "cache"

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(tokenise.TokenWriter, "append", full_disk)
        with pytest.raises(OSError, match="No space"):
            prepare_data(config, cache, progress=False)
    assert entries(cache) == []
    assert len(prepare_data(config, cache, progress=False).train) > 0


def test_a_damaged_entry_is_named(config: DataConfig, tmp_path: Path):
    folder = prepare_data(config, tmp_path / "cache", progress=False).folder
    (folder / "summary.json").write_text("{")
    with pytest.raises(DataError, match=r"cache entry .* is damaged .*delete it"):
        prepare_data(config, tmp_path / "cache", progress=False)


def test_callers_that_start_together_build_once(config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    built = []

    def counted(config: DataConfig, folder: Path, *, progress: bool) -> None:
        built.append(folder)
        tokenise.tokenise(config, folder, progress=progress)

    monkeypatch.setattr(prepare, "tokenise", counted)
    with ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(prepare_data, config, tmp_path / "cache", progress=False) for _ in range(4)]
        lengths = {len(call.result().train) for call in calls}
    assert len(built) == len(lengths) == 1


def test_all_sources_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    (tmp_path / "notes.txt").write_text("\n\n".join(f"note {n} about the weather" for n in range(40)))
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"text": "row {n} of the table"}}\n' for n in range(40)))
    config = DataConfig(
        sources=(
            PythonSource(max_bytes=20_000),
            TextSource(paths=(str(tmp_path / "notes.txt"),), separator="\n\n", domain="notes"),
            JsonlSource(paths=(str(rows),), domain="rows"),
            DatasetsSource(path="json", data_files=str(rows), domain="stream", max_documents=10),
        ),
        tokenizer=TrainBPE(vocab_size=400, max_bytes=10_000),
        sequence_length=32,
        validation_fraction=0.1,
    )
    data = prepare_data(config, tmp_path / "cache")
    assert data.summary.domains == ("prose", "code", "notes", "rows", "stream")
    assert next(data.train_batches())["input_ids"].shape == (16, 32)


def test_pretrained_tokenizer_is_used_as_it_is(config: DataConfig, tokenizer, tmp_path: Path):
    tokenizer.save_pretrained(tmp_path / "saved")
    config = changed(config, tokenizer=PretrainedTokenizer(path=str(tmp_path / "saved")).to_dict())
    data = prepare_data(config, tmp_path / "cache", progress=False)
    assert data.tokenizer.get_vocab() == tokenizer.get_vocab()


def _is_held_out(text: str) -> bool:
    return is_validation(Document(text, "text", ""), 0.3)


def test_merges_are_not_learnt_from_held_out_text(tmp_path: Path):
    held_out = [text for n in range(30) if _is_held_out(text := f"{n}" + " zyxwvut" * 50)]
    training = [text for n in range(30) if not _is_held_out(text := f"{n} aaaa")]
    lines = [json.dumps({"text": text}) + "\n" for text in held_out + training]
    (tmp_path / "rows.jsonl").write_text("".join(lines))
    config = DataConfig(
        sources=(JsonlSource(paths=(str(tmp_path / "rows.jsonl"),)),), validation_fraction=0.3, sequence_length=4
    )
    data = prepare_data(config, tmp_path / "cache", progress=False)
    assert data.summary.validation["text"].documents == len(held_out) > 3
    assert not any("zy" in token for token in data.tokenizer.get_vocab())


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"sequence_length": 10**6}, ConfigError, r"data\.sequence_length = 1000000 is longer than the training text"),
        ({"validation_fraction": 1e-9}, ConfigError, r"data\.validation_fraction = 1e-09 holds out none of the 60"),
        ({"tokenizer": {"type": "pretrained", "path": "./nothing"}}, DataError, r"no tokenizer folder './nothing'"),
        ({"sources": [{"type": "text", "paths": ["nothing.txt"]}]}, DataError, r"no file at 'nothing\.txt'"),
    ],
)
def test_impossible_requests_are_refused(
    config: DataConfig, tmp_path: Path, changes: dict, error: type[Exception], message: str
):
    with pytest.raises(error, match=message):
        prepare_data(changed(config, **changes), tmp_path / "cache", progress=False)


def test_empty_corpus_is_refused(config: DataConfig, corpus: Path, tmp_path: Path):
    corpus.write_text('{"text": "  ", "kind": "odd"}\n')
    with pytest.raises(DataError, match=r"corpus is empty.*check `data\.sources`"):
        prepare_data(config, tmp_path / "cache", progress=False)
    assert entries(tmp_path / "cache") == []
