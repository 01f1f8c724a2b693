"""A tokenizer by characters, and tiny models that read it."""

from __future__ import annotations

from typing import Any

import torch
from tests.infer.decode.models import own, stock
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

CHARACTERS = "0123456789abcdefghijklmnopqrstuvwxyz .,:=+-*/?#()\n$"


def character_tokenizer(**special: Any) -> PreTrainedTokenizerFast:
    """A token for each character, below the 64 of the tiny models."""
    names = ["<pad>", "<s>", "</s>", "<unk>"]
    raw = Tokenizer(models.WordLevel({token: place for place, token in enumerate([*names, *CHARACTERS])}, "<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    raw.decoder = decoders.Fuse()
    values = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", **special}
    return PreTrainedTokenizerFast(tokenizer_object=raw, **values)


def text_model(name: str) -> PreTrainedModel:
    """`own`, or a stock family."""
    return own() if name == "own" else stock(name)


class Fixed:
    """A decoding that gives each row the text that `texts` has for the prompt and the number of the sample."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, texts: dict[str, list[str]]) -> None:
        self._tokenizer, self._texts = tokenizer, texts
        self.batches: list[int] = []
        self._given = dict.fromkeys(texts, 0)

    def __call__(self, model: PreTrainedModel, batch: Any, /) -> torch.Tensor:
        self.batches.append(len(batch.input_ids_BS))
        new = []
        for row in batch.input_ids_BS:
            prompt = str(self._tokenizer.decode(row, skip_special_tokens=True))
            text = self._texts[prompt][self._given[prompt]]
            self._given[prompt] += 1
            new.append([*self._tokenizer(text).input_ids, 2])
        width = max(map(len, new))
        padded = torch.tensor([row + [batch.pad_token_id] * (width - len(row)) for row in new])
        return torch.cat([batch.input_ids_BS, padded], dim=1)
