import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from moesaic.data import DataConfig, JsonlSource, load_tokenizer, prepare_data, train_tokenizer
from moesaic.data.tokenizer import encode, tokenizer_hash, vocabulary_limit
from moesaic.errors import DataError


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_round_trips(tokenizer: PreTrainedTokenizerFast, text: str):
    assert tokenizer.decode(encode(tokenizer, [text])[0]) == text


def test_training_is_deterministic():
    # Many pairs of equal count: the order of ties must not depend on the process's hash seeds.
    texts = [" ".join(f"{a}{b}" for a in "abcdefgh" for b in "stuvwxyz") for _ in range(3)]
    one, other = train_tokenizer(texts, 330), train_tokenizer(iter(texts), 330)
    assert tokenizer_hash(one) == tokenizer_hash(other)
    assert len(one) == 330


def test_vocabulary_is_bytes_specials_and_merges(tokenizer: PreTrainedTokenizerFast):
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|endoftext|>", "<|pad|>")
    assert len(tokenizer) == vocabulary_limit(tokenizer) == 280
    assert len(train_tokenizer([], 4096)) == 258, "no text, no merges"


def test_a_special_token_written_in_text_is_text(tokenizer: PreTrainedTokenizerFast):
    [token_ids] = encode(tokenizer, ["before<|endoftext|>after"])
    assert tokenizer.eos_token_id not in token_ids
    assert tokenizer.decode(token_ids) == "before<|endoftext|>after"


def test_saved_tokenizer_loads_equal(tokenizer: PreTrainedTokenizerFast, tmp_path: Path):
    tokenizer.save_pretrained(tmp_path / "saved")
    for loaded in (load_tokenizer(tmp_path / "saved"), AutoTokenizer.from_pretrained(tmp_path / "saved")):
        assert tokenizer_hash(loaded) == tokenizer_hash(tokenizer)
        assert loaded.eos_token_id == tokenizer.eos_token_id
        batch = loaded(["the fox", "dog"], padding=True)
        assert set(batch) == {"input_ids", "attention_mask"}
        assert batch["attention_mask"][1][0] == 0, "padding stands on the left, as generation needs it"


@pytest.mark.parametrize("path", ["./nothing", "/nothing/here", "a/b/c"])
def test_unknown_path_is_named(path: str):
    with pytest.raises(DataError, match=f"no tokenizer folder '{path}'"):
        load_tokenizer(path)


def test_folder_without_tokenizer_is_named(tmp_path: Path):
    with pytest.raises(DataError, match="cannot load a tokenizer from"):
        load_tokenizer(tmp_path)


def test_tokenizer_without_eos_is_refused(tokenizer: PreTrainedTokenizerFast, tmp_path: Path):
    PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer).save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": None}))
    with pytest.raises(DataError, match="has no eos_token"):
        load_tokenizer(tmp_path)


def test_a_bad_line_met_while_training_stays_a_data_error(tmp_path: Path):
    (tmp_path / "bad.jsonl").write_text('{"text": "good"}\n{"text": \n')
    config = DataConfig(sources=(JsonlSource(paths=(str(tmp_path / "bad.jsonl"),)),))
    with pytest.raises(DataError, match=r"bad\.jsonl:2"):
        prepare_data(config, tmp_path / "cache", progress=False)
