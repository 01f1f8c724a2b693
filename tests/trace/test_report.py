from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import jinja2
import pytest
import torch
from tests.trace.models import tiny_model

from moesaic.errors import ConfigError
from moesaic.layer import Routing, RoutingContext, max_violation, routing_entropy
from moesaic.trace import Accounting, RoutingTrace, account, coactivation, relative_load, top_tokens, write_report
from moesaic.trace import report as report_module

NUM_EXPERTS, TOP_K = 6, 2
VOID = {"meta", "br", "hr", "img", "link", "input"}


class Page(HTMLParser):
    """Checks nesting and collects tables by caption, attributes and text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.attributes: list[tuple[str, str, str]] = []
        self._caption, self._rows = "", []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)
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
            self.tables[self._caption] = self._rows

    def handle_data(self, data: str) -> None:
        if "caption" in self.open:
            self._caption += data
        elif self._rows and self._rows[-1] and {"th", "td"} & set(self.open):
            self._rows[-1][-1] += data


class Tokenizer:
    """Tokens whose text would break a page that does not escape it."""

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        names = {0: "<script>alert(1)</script>", 1: "</table>", 2: " &amp;\n", 3: '" onload="', 4: "\ufffd"}
        return names.get(ids[0], f"t{ids[0]}")

    def convert_ids_to_tokens(self, token_id: int) -> str:
        return f"byte{token_id}"


def make_trace(tokens: int = 200, top_k: int = TOP_K) -> RoutingTrace:
    """Two layers; expert 5 of layer 3 is never picked."""
    generator = torch.Generator().manual_seed(0)
    trace = RoutingTrace("tokens")
    for domain in ("code", "<prose>"):
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


@pytest.fixture(scope="module")
def accounting() -> Accounting:
    return account(tiny_model())


@pytest.fixture
def trace() -> RoutingTrace:
    return make_trace()


@pytest.fixture
def html(tmp_path: Path, trace: RoutingTrace, accounting: Accounting) -> str:
    path = write_report(
        tmp_path / "report.html", trace, accounting, title="a <b>", tokenizer=Tokenizer(), facts={"text": "x & y"}
    )
    return path.read_text(encoding="utf-8")


def read(html: str) -> Page:
    page = Page()
    page.feed(html)
    page.close()
    assert page.open == []
    return page


def numbers(rows: list[list[str]]) -> torch.Tensor:
    """The body of a matrix table without its row names."""
    return torch.tensor([[float(cell) for cell in row[1:]] for row in rows[1:]], dtype=torch.float64)


def test_the_page_is_well_formed_and_needs_no_network(html: str):
    page = read(html)
    loading = {"src", "srcset", "data", "action", "poster", "background", "xlink:href"}
    assert not [attribute for attribute in page.attributes if attribute[1] in loading]
    assert all(value.startswith("#") for _, name, value in page.attributes if name == "href")
    assert not re.search(r"https?:|//[a-z]+\.|@import|url\(", html)


def test_screen_readers_find_their_way(html: str):
    page = read(html)
    assert ("html", "lang", "en") in page.attributes
    assert "<title>Routing report: a &lt;b&gt;</title>" in html
    assert html.count("<svg ") == html.count('role="img" aria-label="')
    assert "" not in page.tables  # every table has a caption
    assert all(("scope" in tag) for tag in re.findall(r"<th\b[^>]*>", html))


def test_text_of_tokens_title_and_domains_is_escaped(html: str):
    page = read(html)
    tokens = " ".join(cell for row in page.tables["Tokens of each expert of layer 1"] for cell in row)
    for shown in ("<script>alert(1)</script>", "</table>", "␣&amp;⏎", '"␣onload="', "byte4", "t5"):
        assert shown in tokens
    assert html.count("<script>") == 1  # the page's own
    assert {"code", "<prose>"} == {row[0] for row in _table(page, "domain's mean", "layer 1")[1:]}


def test_tables_hold_the_numbers_of_the_metrics(html: str, trace: RoutingTrace, accounting: Accounting):
    page = read(html)
    loads = torch.stack([relative_load(layer.load_N) for layer in trace.layers.values()])
    torch.testing.assert_close(numbers(_table(page, "Load relative to the layer")), loads, atol=5e-4, rtol=0)
    balance = page.tables["Balance by layer"][1:]
    for row, layer in zip(balance, trace.layers.values(), strict=True):
        unused = int((layer.load_N == 0).sum())
        expected = [f"{routing_entropy(layer.load_N):.4f}", f"{max_violation(layer.load_N):.4f}", str(unused)]
        assert row == [str(layer.layer), *expected]
    for index, layer in trace.layers.items():
        together = coactivation(layer.index_TK, NUM_EXPERTS)
        shown = numbers(_table(page, f"Co-activation of layer {index}"))
        torch.testing.assert_close(shown, together, atol=5e-4, rtol=0)
        picks = [int(row[1].replace(",", "")) for row in page.tables[f"Load of each expert of layer {index}"][1:]]
        assert picks == layer.load_N.tolist()
        by_domain = torch.stack([relative_load(load_N) for load_N in layer.domain_loads.values()])
        shown = numbers(_table(page, "domain's mean", f"layer {index}"))
        torch.testing.assert_close(shown, by_domain, atol=5e-4, rtol=0)
    assert page.tables["Parameters by part"][-1][1] == f"{accounting.total:,}"
    assert page.tables["Parameters by part"][-1][3] == f"{accounting.active:,}"


def test_token_lists_are_those_of_the_metrics(html: str, trace: RoutingTrace):
    layer = trace.layers[1]
    best = top_tokens(layer.index_TK, trace.token_ids_T, NUM_EXPERTS, by="lift", top=8, minimum=5)
    titles = re.findall(r'title="token (\d+): (\d+) picks, lift ([\d.]+)"', html)
    expected = [(str(item.token_id), str(item.count), f"{item.lift:.2f}") for item in best[0]]
    assert titles[: len(expected)] == expected


def test_unused_experts_are_crossed_out(html: str):
    load_plot = html[html.index('aria-label="Load of every expert') :]
    assert load_plot[: load_plot.index("</svg>")].count('class="cross"') == 1


def test_one_pick_one_domain_and_no_tokenizer(tmp_path: Path, accounting: Accounting):
    trace = make_trace(top_k=1)
    for layer in trace.layers.values():
        layer.domain_loads = {"": layer.load_N}
    html = write_report(tmp_path / "report.html", trace, accounting, title="one pick").read_text(encoding="utf-8")
    page = read(html)
    assert "No token picked two experts" in html
    assert not [caption for caption in page.tables if "domain" in caption]
    assert page.tables["Tokens of each expert of layer 1"][1][2][0].isdigit()


def test_large_models_show_some_layers_in_detail(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, trace: RoutingTrace, accounting: Accounting
):
    monkeypatch.setattr(report_module, "MAX_CELLS", NUM_EXPERTS**2)
    html = write_report(tmp_path / "report.html", trace, accounting, title="large").read_text(encoding="utf-8")
    assert html.count('<section class="layer"') == 1
    assert "1 of 2 MoE layers are shown in detail" in html


def test_independent_picks_are_counted_where_tokens_differ_in_their_number():
    """Picks 2, 2, 0 and 3 of 6 experts: beside a pick stand (2 * 1 + 2 * 1 + 3 * 2) / 7 others, of 5."""
    trace = RoutingTrace("tokens")
    index_TK = torch.tensor([[0, 1, 6], [2, 5, 6], [6, 6, 6], [0, 3, 4]])
    scores_TN = torch.full((4, 6), 1 / 6)
    trace.add(RoutingContext(records={0: Routing(index_TK, torch.ones(4, 3), scores_TN, scores_TN, scores_TN)}))
    assert report_module._independent(trace.layers[0]) == pytest.approx(10 / 7 / 5)


def test_a_failure_leaves_the_old_page_and_nothing_else(tmp_path: Path, trace: RoutingTrace, accounting: Accounting):
    path = tmp_path / "report.html"
    path.write_text("old")
    with pytest.raises(ConfigError, match=r"trace = 0 holds no tokens"):
        write_report(path, RoutingTrace("tokens"), accounting, title="empty")
    broken = SimpleNamespace(decode=lambda ids, skip_special_tokens: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_report(path, trace, accounting, title="broken", tokenizer=broken)
    with pytest.raises(jinja2.UndefinedError):
        write_report(path, trace, SimpleNamespace(total=1), title="broken")  # type: ignore[arg-type]
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


def _table(page: Page, *parts: str) -> list[list[str]]:
    return next(rows for caption, rows in page.tables.items() if all(part in caption for part in parts))
