"""Reading a page in tests, and traces to make pages of."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from html.parser import HTMLParser

import torch

from moesaic.layer import Routing, RoutingContext
from moesaic.trace import RoutingTrace
from moesaic.trace.header import LayerFacts, TraceHeader
from moesaic.trace.rows import Rows, TokenColumns

NUM_EXPERTS, TOP_K = 6, 2
VOID = {"meta", "br", "hr", "img", "link", "input"}


class Page(HTMLParser):
    """Checks nesting and collects tables by caption, attributes and text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.attributes: list[tuple[str, str, str]] = []
        self.headings: list[int] = []
        self._caption, self._rows = "", []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("h1", "h2", "h3", "h4"):
            self.headings.append(int(tag[1]))
        if tag == "table":
            self._caption, self._rows = "", []
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("th", "td"):
            self._rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if tag == "table":
            self.tables.setdefault(self._caption, self._rows)

    def handle_data(self, data: str) -> None:
        if "caption" in self.open:
            self._caption += data
        elif self._rows and self._rows[-1] and {"th", "td"} & set(self.open):
            self._rows[-1][-1] += data


class Tokenizer:
    """Tokens whose text would break a page that does not escape it."""

    all_special_ids: tuple[int, ...] = ()

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        names = {0: "<script>alert(1)</script>", 1: "</table>", 2: " &amp;\n", 3: '" onload="', 4: "\ufffd"}
        return names.get(ids[0], f"t{ids[0]} ")

    def convert_ids_to_tokens(self, token_id: int) -> str:
        return f"byte{token_id}"


def make_trace(tokens: int = 200, top_k: int = TOP_K, domains: tuple[str, ...] = ("code", "<prose>")) -> RoutingTrace:
    """Two layers and a text for each domain; expert 5 of layer 3 is never picked."""
    generator = torch.Generator().manual_seed(0)
    trace = RoutingTrace("tokens")
    for domain in domains:
        logits = {layer: torch.randn(tokens, NUM_EXPERTS, generator=generator) for layer in (1, 3)}
        logits[3][:, 5] = -99.0
        records = {}
        for layer, logits_TN in logits.items():
            weight_TK, index_TK = logits_TN.softmax(-1).topk(top_k)
            records[layer] = Routing(index_TK, weight_TK, logits_TN, logits_TN, logits_TN)
        ids_T = torch.randint(0, 8, (tokens,), generator=generator)
        with trace.domain(domain):
            trace.add(RoutingContext(token_ids_T=ids_T, records=records))
    return trace


class SyntheticLog:
    """Random routing of documents of equal length through many layers, made anew at each reading; some experts are
    dead, some popular, tokens have preferences, and late picks of popular experts are dropped."""

    def __init__(
        self, *, layers: int = 60, experts: int = 1000, top_k: int = 8, documents: int = 8, length: int = 128
    ) -> None:
        facts = LayerFacts(num_experts=experts, top_k=top_k, router="top_k")
        self.header = TraceHeader(layers=dict.fromkeys(range(layers), facts), domains=("", "code", "prose"))
        self._experts, self._top_k, self._length = experts, top_k, length
        total = documents * length
        document_T = torch.arange(documents).repeat_interleave(length)
        place_T = torch.arange(length, dtype=torch.int32).repeat(documents)
        self._tokens = TokenColumns(
            document_T=document_T,
            position_T=place_T,
            place_T=place_T,
            token_T=torch.randint(0, 200, (total,), generator=torch.Generator().manual_seed(1), dtype=torch.int32),
            domain_T=(document_T % 2 + 1).to(torch.int16),
            turn_T=torch.full((total,), -1, dtype=torch.int16),
            modality_T=torch.full((total,), -1, dtype=torch.int8),
        )

    def rows(self, layers: Collection[int] | None = None) -> Iterator[Rows]:
        for layer in self.header.layers:
            if layers is not None and layer not in layers:
                continue
            generator = torch.Generator().manual_seed(layer)
            liking_VN = torch.randn(200, self._experts, generator=generator)
            noise_TN = torch.randn(len(self._tokens), self._experts, generator=generator)
            scores_TN = noise_TN + 2 * liking_VN[self._tokens.token_T.long()]
            scores_TN[:, ::50] = -99.0
            weight_TK, choice_TK = scores_TN.topk(self._top_k)
            late_T = self._tokens.place_T >= self._length * 3 // 4
            yield Rows(
                layer=layer,
                tokens=self._tokens,
                choice_TK=choice_TK.to(torch.int16),
                weight_TK=weight_TK.softmax(-1),
                dropped_TK=late_T.unsqueeze(-1) & (choice_TK % 7 == 0),
            )


def numbers(rows: list[list[str]]) -> torch.Tensor:
    """The body of a matrix table without its row names."""
    return torch.tensor([[float(cell) for cell in row[1:]] for row in rows[1:]], dtype=torch.float64)
