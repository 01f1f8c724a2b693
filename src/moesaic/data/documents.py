"""The document: the unit that sources yield, that the split keeps whole and that packing marks the ends of."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple


class Document(NamedTuple):
    """One text.

    Attributes:
        text: its content.
        domain: the kind of text, e.g. `prose`; losses are reported by domain.
        origin: where it was found (`notes/a.md`, `corpus.jsonl:12`), for messages.
        split_by: text that decides its side of the split, so that documents made of one file stay together; None for its
            own text.
    """

    text: str
    domain: str
    origin: str
    split_by: str | None = None


def capped(
    documents: Iterable[Document], *, max_documents: int | None = None, max_bytes: int | None = None
) -> Iterator[Document]:
    """Yield non-blank documents until one of the limits is reached; the document that reaches it is still yielded."""
    taken_documents = taken_bytes = 0
    for document in documents:
        if not document.text.strip():
            continue
        yield document
        taken_documents += 1
        taken_bytes += 0 if max_bytes is None else len(document.text.encode())
        if taken_documents == max_documents or (max_bytes is not None and taken_bytes >= max_bytes):
            return
