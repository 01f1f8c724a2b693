from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tests.trace.models import tiny_model
from tests.trace.report.reading import NUM_EXPERTS, Page, Tokenizer, make_trace, numbers

from moesaic.errors import ConfigError
from moesaic.layer import max_violation, routing_entropy
from moesaic.trace import Accounting, RoutingTrace, account, coactivation, relative_load, top_tokens, write_report


@pytest.fixture(scope="module")
def accounting() -> Accounting:
    return account(tiny_model())


@pytest.fixture(scope="module")
def trace() -> RoutingTrace:
    return make_trace()


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory, trace: RoutingTrace, accounting: Accounting) -> str:
    folder = tmp_path_factory.mktemp("page")
    facts = {"text": "x & y"}
    path = write_report(folder / "r.html", trace, accounting, title="a <b>", tokenizer=Tokenizer(), facts=facts)
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


def embedded(html: str, name: str) -> dict:
    found = re.search(rf'<script type="application/json" id="{name}">(.*?)</script>', html, re.DOTALL)
    assert found is not None
    return json.loads(found.group(1))


def test_the_page_needs_no_network(page: Page, html: str):
    loading = {"src", "srcset", "data", "action", "poster", "background", "xlink:href"}
    assert not [attribute for attribute in page.attributes if attribute[1] in loading]
    assert all(value.startswith(("#", "data:image/png;")) for _, name, value in page.attributes if name == "href")
    assert not re.search(r"https?:|//[a-z]+\.|@import|url\(", html)


def test_screen_readers_find_their_way(page: Page, html: str):
    assert ("html", "lang", "en") in page.attributes
    assert "<title>Routing report: a &lt;b&gt;</title>" in html
    assert html.count("<svg ") == html.count('role="img" aria-label="')
    assert "" not in page.tables  # every table has a caption
    assert all(("scope" in tag) for tag in re.findall(r"<th\b[^>]*>", html))
    assert page.headings[0] == 1
    assert all(after - before <= 1 for before, after in zip(page.headings, page.headings[1:], strict=False))
    names = [value for _, name, value in page.attributes if name == "id"]
    assert len(names) == len(set(names))


def test_text_of_tokens_title_and_domains_is_escaped(page: Page, html: str):
    tokens = " ".join(cell for row in page.tables["Tokens of each expert"] for cell in row)
    for shown in ("<script>alert(1)</script>", "</table>", "␣&amp;⏎", '"␣onload="', "byte4", "t5"):
        assert shown in tokens
    assert html.count("<script") == 3  # the page's own, and two with data
    texts = embedded(html, "texts")
    assert {"<script>alert(1)</script>", "</table>", " &amp;\n"} <= set(texts["texts"])
    assert {document["domain"] for document in texts["documents"]} == {"code", "<prose>"}


def test_tables_hold_the_numbers_of_the_metrics(page: Page, html: str, trace: RoutingTrace, accounting: Accounting):
    loads = torch.stack([relative_load(layer.load_N) for layer in trace.layers.values()])
    torch.testing.assert_close(numbers(page.tables["Load relative to the layer's mean"]), loads, atol=5e-4, rtol=0)
    balance = page.tables["Balance by layer"][1:]
    for row, layer in zip(balance, trace.layers.values(), strict=True):
        expected = [f"{routing_entropy(layer.load_N):.4f}", f"{max_violation(layer.load_N):.4f}"]
        assert row[:3] == [str(layer.layer), *expected]
        assert row[6] == str(int((layer.load_N == 0).sum()))
    tables = embedded(html, "numbers")["tables"]
    for index, layer in trace.layers.items():
        together = coactivation(layer.index_TK, NUM_EXPERTS).nan_to_num()  # empty cells
        shown = torch.tensor(
            [[cell or 0.0 for cell in row[1:]] for row in tables[f"coactivation-layer-{index}"]["rows"]],
            dtype=torch.float64,
        )
        torch.testing.assert_close(shown, together, atol=1e-5, rtol=0)
        assert [row[2] for row in tables[f"load-layer-{index}"]["rows"]] == layer.load_N.tolist()
    assert page.tables["Parameters by part"][-1][1] == f"{accounting.total:,}"
    assert page.tables["Parameters by part"][-1][3] == f"{accounting.active:,}"


def test_token_lists_are_those_of_the_metrics(html: str, trace: RoutingTrace):
    layer, ids_T = trace.layers[1], trace.token_ids_T
    assert ids_T is not None
    best = top_tokens(layer.index_TK, ids_T, NUM_EXPERTS, by="lift", top=8, minimum=5)
    titles = re.findall(r'title="token (\d+): (\d+) picks, lift ([\d.]+)"', html)
    expected = [(str(item.token_id), str(item.count), f"{item.lift:.2f}") for item in best[0]]
    assert titles[: len(expected)] == expected


def test_unused_experts_are_named(html: str):
    load_plot = html[html.index('aria-label="Load of every expert') :]
    assert "never picked" in load_plot[: load_plot.index("</svg>")]


def test_one_pick_one_domain_and_no_tokenizer(tmp_path: Path):
    html = write_report(tmp_path / "r.html", make_trace(top_k=1, domains=("",)), title="x").read_text(encoding="utf-8")
    found = Page(html)
    assert "Size and cost" not in html
    assert "Experts picked together" not in html
    assert found.tables["Tokens of each expert"][1][2][0].isdigit()


def test_a_failure_leaves_the_old_page_and_nothing_else(tmp_path: Path, trace: RoutingTrace, accounting: Accounting):
    path = tmp_path / "report.html"
    path.write_text("old")
    with pytest.raises(ConfigError, match=r"trace = 0 holds no tokens"):
        write_report(path, RoutingTrace("tokens"), accounting, title="empty")
    broken = SimpleNamespace(decode=lambda ids, skip_special_tokens: 1 / 0, all_special_ids=[])
    with pytest.raises(ZeroDivisionError):
        write_report(path, trace, accounting, title="broken", tokenizer=broken)
    with pytest.raises(AttributeError):
        write_report(path, trace, SimpleNamespace(total=1), title="broken")  # type: ignore[arg-type]
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]
