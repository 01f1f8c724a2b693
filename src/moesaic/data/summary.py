"""How much text there is: documents, tokens and bytes by split and domain."""

from __future__ import annotations

from typing import Literal

from moesaic.configuration import Config


class Amount(Config):
    """An amount of text.

    Attributes:
        documents: number of documents.
        tokens: number of tokens, one EOS a document included.
        bytes: UTF-8 bytes of text.
    """

    documents: int = 0
    tokens: int = 0
    bytes: int = 0

    def __add__(self, other: Amount) -> Amount:
        return Amount(
            documents=self.documents + other.documents,
            tokens=self.tokens + other.tokens,
            bytes=self.bytes + other.bytes,
        )


class DataSummary(Config):
    """What `prepare_data` found.

    Attributes:
        domains: names, in the order of their indices (`domain_ids` of a batch).
        token_dtype: type of the ids on disk.
        train: amount of training text by domain.
        validation: amount of held-out text by domain.
    """

    domains: tuple[str, ...]
    token_dtype: Literal["uint16", "uint32"]
    train: dict[str, Amount]
    validation: dict[str, Amount]
