import pytest

from moesaic.data import DataConfig
from moesaic.errors import ConfigError


def test_round_trip_of_every_source():
    config = DataConfig.from_dict(
        {
            "sources": [
                {"type": "python", "domains": ["code"], "max_bytes": 1000},
                {"type": "text", "paths": ["notes"], "separator": "\n\n"},
                {"type": "jsonl", "paths": ["a.jsonl"], "domain_field": "kind"},
                {"type": "datasets", "path": "json", "data_files": {"train": ["a.jsonl", "b.jsonl"]}},
            ],
            "tokenizer": {"type": "pretrained", "path": "gpt2"},
        }
    )
    assert DataConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sources": []}, "sources"),
        ({"sources": [{"type": "csv"}]}, r"sources\.0\.type = 'csv' is not one of the choices.*jsonl"),
        ({"sources": [{"type": "text"}]}, r"sources\.0\.paths.*is required"),
        ({"tokenizer": {"type": "train_bpe", "vocab_size": 100}}, r"tokenizer\.vocab_size = 100"),
        ({"validation_fraction": 0}, r"validation_fraction = 0 .*greater than 0"),
        ({"sequence_lenght": 3}, "did you mean 'sequence_length'"),
    ],
)
def test_bad_values_are_named(values: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        DataConfig.from_dict(values)
