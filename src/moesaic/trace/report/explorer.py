"""Token explorer: recorded texts, token by token, with every token's experts and weights in every layer."""

from __future__ import annotations

import base64
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from moesaic.trace.report.documents import Document, chosen_documents
from moesaic.trace.report.parts import Section
from moesaic.trace.report.subject import Subject

_STATIC_TOKENS, _STATIC_LAYERS = 24, 6


def section(subject: Subject, environment: jinja2.Environment) -> tuple[Section, dict[str, Any]]:
    """The section, and the data that its script reads."""
    documents = chosen_documents(subject.log)
    data = _data(subject, documents)
    total, shown = subject.num_documents, len(documents)
    tokens = sum(len(document.token_T) for document in documents)
    intro = (
        "Which experts a token goes to, layer by layer. Choose a text and a layer; point at a token, click it, or move with "
        "the arrow keys to see all its experts. Find looks for words in all texts below and lists them with their experts."
    )
    notes = [
        f"{shown:,} of {total:,} recorded texts are in this page ({tokens:,} of {subject.num_tokens:,} tokens)."
        if shown < total or tokens < subject.num_tokens
        else f"All {total:,} recorded texts are in this page ({tokens:,} tokens).",
        'To see another text, let the model read it: moesaic inspect MODEL --prompt "your text" --report page.html',
    ]
    own = environment.get_template("explorer.html.j2").render(
        documents=documents,
        data=data,
        static=_static(subject, documents[0]) if documents else None,
        entropy="of the router's scores" if subject.log.header.has_scores else "of the weights of a token's picks",
    )
    return Section("explorer", "Token explorer", intro, notes=notes, own=Markup(own)), data


def _data(subject: Subject, documents: list[Document]) -> dict[str, Any]:
    layers = subject.log.header.layers
    columns = max(facts.num_columns for facts in layers.values())
    kind = np.uint8 if columns < 255 else np.uint16
    scale_L = np.zeros(len(layers), dtype=np.float32)
    for document in documents:
        scale_L = np.maximum(scale_L, document.weight_LTK.max(axis=(1, 2), initial=0.0))
    vocabulary = sorted({int(token) for document in documents for token in document.token_T})
    number = {token: index for index, token in enumerate(vocabulary)}
    domains = subject.log.header.domains
    return {
        "layers": [
            {"layer": layer, "experts": facts.num_experts, "nulls": facts.num_null, "scale": float(scale)}
            for (layer, facts), scale in zip(sorted(layers.items()), scale_L, strict=True)
        ],
        "width": max(facts.top_k for facts in layers.values()),
        "bytes": np.dtype(kind).itemsize,
        "ids": vocabulary,
        "texts": [subject.names.text(token) for token in vocabulary],
        "documents": [
            {
                "number": document.number,
                "domain": domains[document.domain],
                "length": document.length,
                "tokens": [number[int(token)] for token in document.token_T],
                "position": _runs(document.position_T),
                "turn": document.turn_T.tolist() if (document.turn_T >= 0).any() else None,
                "choice": _encoded(document.choice_LTK.astype(kind)),  # -1 becomes the largest number
                "weight": _encoded(_scaled(document.weight_LTK, scale_L)),
                "dropped": _encoded(np.packbits(document.dropped_LTK)) if document.dropped_LTK.any() else None,
                "entropy": _encoded(np.rint(np.clip(document.entropy_LT, 0, 1) * 255).astype(np.uint8)),
            }
            for document in documents
        ],
    }


def _scaled(weight_LTK: np.ndarray, scale_L: np.ndarray) -> np.ndarray:
    """Weights as shares of their layer's largest, in 65,535 steps; negative ones become 0."""
    shares = weight_LTK / np.maximum(scale_L, 1e-30)[:, None, None]
    return np.rint(np.clip(shares, 0.0, 1.0) * 65_535).astype("<u2")


def _encoded(values: np.ndarray) -> str:
    return base64.b64encode(values.astype(values.dtype.newbyteorder("<"), copy=False).tobytes()).decode()


def _runs(position_T: np.ndarray) -> int | list[int]:
    """The first position if they count on from it, else all."""
    first = int(position_T[0])
    return first if (position_T == first + np.arange(len(position_T))).all() else position_T.tolist()


def _static(subject: Subject, document: Document) -> dict[str, Any]:
    """The beginning of the first text as a table, for pages without scripts."""
    layers = sorted(subject.log.header.layers)
    chosen = np.unique(np.linspace(0, len(layers) - 1, min(_STATIC_LAYERS, len(layers))).round().astype(int))
    rows = [
        (subject.names.visible(int(document.token_T[token])), [_picks(document, int(at), token) for at in chosen])
        for token in range(min(_STATIC_TOKENS, len(document.token_T)))
    ]
    return {"layers": [layers[int(at)] for at in chosen], "rows": rows}


def _picks(document: Document, layer: int, token: int) -> str:
    picks = zip(document.choice_LTK[layer, token].tolist(), document.weight_LTK[layer, token].tolist(), strict=True)
    return ", ".join(f"{expert} ({weight:.2f})" for expert, weight in picks if expert >= 0) or "none"
