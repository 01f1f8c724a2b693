"""Which documents are held out for validation."""

from __future__ import annotations

import hashlib

from moesaic.data.documents import Document


def is_validation(document: Document, fraction: float) -> bool:
    """Whether `document` is held out; about `fraction` of all documents are.

    The hash of the text (or of `Document.split_by`) decides: the side of a document does not depend on the other documents, on order or on a seed;
    equal texts are on the same side; and a larger fraction keeps every document that a smaller one held out.
    """
    text = document.text if document.split_by is None else document.split_by
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64
