"""Rows as Arrow tables, and how Parquet stores them; docs/contracts/trace.md has the format."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from moesaic.trace.rows import NOTHING, Rows, TokenColumns

HEADER_KEY = b"moesaic.trace"
PART_KEY = b"moesaic.part"
NO_STEP = -1

_TOKEN_TYPES = {
    "document": pa.int64(),
    "position": pa.int32(),
    "place": pa.int32(),
    "token": pa.int32(),
    "domain": pa.dictionary(pa.int16(), pa.string()),
    "turn": pa.int16(),
    "modality": pa.int8(),
}
_LISTS = {"choice": pa.list_(pa.int32()), "weight": pa.list_(pa.float32()), "dropped": pa.list_(pa.bool_())}
_SCORES = pa.list_(pa.float32())


def schema(*, has_scores: bool) -> pa.Schema:
    """Columns of a part."""
    fields = [pa.field("step", pa.int32(), nullable=False), pa.field("layer", pa.int32(), nullable=False)]
    fields += [pa.field(name, kind, nullable=False) for name, kind in _TOKEN_TYPES.items()]
    fields += [pa.field(name, kind, nullable=name == "dropped") for name, kind in _LISTS.items()]
    return pa.schema(fields + ([pa.field("scores", _SCORES, nullable=False)] if has_scores else []))


def storage(*, has_scores: bool) -> dict[str, Any]:
    """Options of `pyarrow.parquet.ParquetWriter`: numbers that repeat as dictionaries, those that grow as differences."""
    element = ".list.element"
    encoding = dict.fromkeys(("document", "position", "place"), "DELTA_BINARY_PACKED")
    encoding |= {f"{name}{element}": "BYTE_STREAM_SPLIT" for name in ("weight", *(["scores"] if has_scores else []))}
    return {
        "compression": "zstd",
        "compression_level": 1,
        "use_dictionary": ["step", "layer", "token", "domain", "turn", "modality", f"choice{element}"],
        "column_encoding": encoding,
        "write_statistics": ["step", "layer", "document", "domain"],
        "write_page_checksum": True,
    }


def to_table(batches: Sequence[tuple[int, Rows]], domains: Sequence[str], *, has_scores: bool) -> pa.Table:
    """The table of rows of one layer.

    Args:
        batches: optimiser step (or `NO_STEP`) and rows.
        domains: names of the domains by number.
        has_scores: whether the rows hold scores that are wanted.
    """
    parts = [rows for _, rows in batches]
    tokens = TokenColumns.joined([rows.tokens for rows in parts])
    count = len(tokens)
    columns: dict[str, Any] = {
        "step": np.repeat([step for step, _ in batches], [len(rows) for rows in parts]).astype(np.int32),
        "layer": np.full(count, parts[0].layer, dtype=np.int32),
    }
    for name, kind in _TOKEN_TYPES.items():
        column = getattr(tokens, f"{name}_T").numpy()
        columns[name] = pa.array(column, type=kind.index_type if name == "domain" else kind)
    columns["domain"] = pa.DictionaryArray.from_arrays(columns["domain"], pa.array(list(domains), type=pa.string()))
    columns |= _picks(parts)
    if has_scores:
        scores_TM = torch.cat([_scores_of(rows) for rows in parts]).numpy()
        columns["scores"] = _lists(np.full(count, scores_TM.shape[1]), scores_TM.ravel())
    return pa.table(columns, schema=schema(has_scores=has_scores))


def to_rows(
    table: pa.Table, domains: Mapping[str, int], top_k: Mapping[int, int], *, weights: bool = True
) -> Iterator[Rows]:
    """The rows of a table, layer by layer.

    Args:
        table: of the columns in `columns_of`.
        domains: numbers of the domains by name.
        top_k: width of the selections by layer.
        weights: whether the table has weights; without them they are NaN.
    """
    table = table.unify_dictionaries().combine_chunks()
    layer_T = table["layer"].to_numpy()
    for layer in np.unique(layer_T):
        one = table if len(layer_T) and (layer_T == layer).all() else table.filter(pa.array(layer_T == layer))
        choice = _one(one["choice"])
        chosen = _Filled(choice, top_k[int(layer)])
        if weights:
            weight_TK = chosen.of(_one(one["weight"]), np.float32, 0)
        else:
            weight_TK = torch.full((1, 1), torch.nan).expand(len(one), chosen.width)
        yield Rows(
            layer=int(layer),
            tokens=_tokens(one, domains),
            choice_TK=chosen.of(choice, np.int32, NOTHING),
            weight_TK=weight_TK,
            dropped_TK=_dropped(_one(one["dropped"]), chosen),
            scores_TM=_matrix(_one(one["scores"])) if "scores" in one.column_names else None,
        )


def columns_of(*, weights: bool, scores: bool) -> list[str]:
    """The columns that `to_rows` reads."""
    names = ["layer", *_TOKEN_TYPES, "choice", "dropped"]
    return names + (["weight"] if weights else []) + (["scores"] if scores else [])


def _picks(parts: list[Rows]) -> dict[str, pa.Array]:
    """The lists of what was selected, without what was not."""
    lengths, choices, weights, drops, known = [], [], [], [], []
    for rows in parts:
        choice_TK, weight_TK = rows.choice_TK.numpy(), rows.weight_TK.numpy()
        picked_TK = choice_TK >= 0
        whole = bool(picked_TK.all())
        lengths.append(np.full(len(rows), choice_TK.shape[1]) if whole else picked_TK.sum(-1))
        choices.append(choice_TK.ravel() if whole else choice_TK[picked_TK])
        weights.append(weight_TK.ravel() if whole else weight_TK[picked_TK])
        known.append(np.full(len(rows), rows.dropped_TK is not None))
        if rows.dropped_TK is not None:
            drops.append(rows.dropped_TK.numpy()[picked_TK])
    length_T, known_T = np.concatenate(lengths), np.concatenate(known)
    dropped = pa.nulls(len(length_T), _LISTS["dropped"])
    if drops:
        dropped = _lists(np.where(known_T, length_T, 0), np.concatenate(drops), missing_T=~known_T)
    return {
        "choice": _lists(length_T, np.concatenate(choices).astype(np.int32)),
        "weight": _lists(length_T, np.concatenate(weights)),
        "dropped": dropped,
    }


def _lists(length_T: np.ndarray, values: np.ndarray, missing_T: np.ndarray | None = None) -> pa.ListArray:
    offsets = np.zeros(len(length_T) + 1, dtype=np.int32)
    np.cumsum(length_T, out=offsets[1:])
    mask = None if missing_T is None or not missing_T.any() else pa.array(missing_T)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values), mask=mask)


def _scores_of(rows: Rows) -> Tensor:
    assert rows.scores_TM is not None, "a trace with scores is given rows with scores"
    return rows.scores_TM


class _Filled:
    """Lists of different lengths as a matrix."""

    def __init__(self, lists: pa.ListArray, width: int) -> None:
        length_T = np.diff(lists.offsets.to_numpy())
        self.width = max(width, int(length_T.max(initial=0)))
        self.there_TK = np.arange(self.width) < length_T[:, None]
        self._whole = bool(self.there_TK.all())

    def of(self, lists: pa.ListArray, dtype: Any, fill: int) -> Tensor:
        values = lists.flatten().to_numpy(zero_copy_only=False)
        if self._whole:
            return torch.from_numpy(values.astype(dtype).reshape(-1, self.width))
        filled_TK = np.full(self.there_TK.shape, fill, dtype=dtype)
        filled_TK[self.there_TK] = values
        return torch.from_numpy(filled_TK)


def _dropped(lists: pa.ListArray, chosen: _Filled) -> Tensor | None:
    if lists.null_count == len(lists):
        return None
    known_T1 = ~np.asarray(lists.is_null().to_numpy(zero_copy_only=False))[:, None]
    filled_TK = np.zeros(chosen.there_TK.shape, dtype=bool)
    filled_TK[chosen.there_TK & known_T1] = lists.flatten().to_numpy(zero_copy_only=False)
    return torch.from_numpy(filled_TK)


def _tokens(table: pa.Table, domains: Mapping[str, int]) -> TokenColumns:
    columns = {
        f"{name}_T": torch.from_numpy(np.array(table[name].to_numpy())) for name in _TOKEN_TYPES if name != "domain"
    }
    domain = _one(table["domain"])
    number_C = np.array([domains[name] for name in domain.dictionary.to_pylist()] or [0], dtype=np.int16)
    return TokenColumns(domain_T=torch.from_numpy(number_C[domain.indices.to_numpy()]), **columns)


def _matrix(lists: pa.ListArray) -> Tensor:
    values = lists.flatten().to_numpy(zero_copy_only=False)
    return torch.from_numpy(np.array(values).reshape(len(lists), -1))


def _one(column: pa.ChunkedArray) -> Any:
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
