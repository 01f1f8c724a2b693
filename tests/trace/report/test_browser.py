"""The page in a real browser, without a network."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
import torch
from tests.trace.models import LAYERS, TOP_K, tiny_model
from tests.trace.report.browser import open_browser, open_page
from tests.trace.report.reading import Tokenizer

from moesaic.trace import RoutingTrace, account, record, router_statistics, write_report

TEXTS = {"code": [5, 9, 2, 7, 7, 30, 12, 3, 5, 0, 41, 9], "prose": [8, 1, 6, 9, 30, 12, 44, 2, 10]}


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def trace(model) -> RoutingTrace:
    with torch.no_grad(), record(model) as trace:
        for domain, ids in TEXTS.items():
            with trace.domain(domain):
                model(torch.tensor([ids]))
    return trace


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory, model, trace: RoutingTrace) -> Path:
    file = tmp_path_factory.mktemp("browser") / "routing.html"
    options = {"tokenizer": Tokenizer(), "statistics": router_statistics(model, trace), "minimum": 2}
    return write_report(file, trace, account(model), title="tiny", **options)


@pytest.fixture(scope="module")
def context():
    with open_browser() as context:
        yield context


@pytest.fixture
def page(context, path: Path):
    page, errors = open_page(context, path)
    yield page
    page.close()
    assert errors == []


def panel(page) -> dict[int, list[tuple[int, float]]]:
    """Experts and weights by layer of the token that the panel shows."""
    rows = page.eval_on_selector_all(
        "#explorer-panel tr[data-layer]",
        """rows => rows.map(row => [Number(row.dataset.layer),
            [...row.querySelectorAll(".pick")].map(pick => [Number(pick.dataset.expert), Number(pick.dataset.weight)])])""",
    )
    return {layer: [(expert, weight) for expert, weight in picks] for layer, picks in rows}


def test_the_explorer_shows_what_the_router_chose(page, model, trace: RoutingTrace):
    """Clicked and reached by key, every token shows the best of `output_router_logits`, as the trace does."""
    for number, (domain, ids) in enumerate(TEXTS.items()):
        with torch.no_grad():
            router_logits = model(torch.tensor([ids]), output_router_logits=True).router_logits
        option = page.locator("#explorer-text option", has_text=f"{number} {domain}")
        page.select_option("#explorer-text", option.get_attribute("value"))
        page.locator("#explorer-words [data-token='0']").click()
        for token in range(len(ids)):
            if token:
                page.keyboard.press("ArrowRight")
            assert page.evaluate("document.activeElement.dataset.token") == str(token)
            shown = panel(page)
            assert sorted(shown) == list(LAYERS)
            for logits_TN, layer in zip(router_logits, LAYERS, strict=True):
                best = logits_TN[token].softmax(-1).topk(TOP_K)
                rows = next(rows for rows in trace.rows([layer]) if int(rows.tokens.document_T[0]) == number)
                assert [expert for expert, _ in shown[layer]] == best.indices.tolist()
                assert [expert for expert, _ in shown[layer]] == rows.choice_TK[token].tolist()
                weights = torch.tensor([weight for _, weight in shown[layer]])
                torch.testing.assert_close(weights, rows.weight_TK[token], atol=3e-5, rtol=0)
        page.keyboard.press("Home")
        assert panel(page) != shown
        page.locator(f"#explorer-words [data-token='{len(ids) - 1}']").click()
        assert panel(page) == shown


def test_hovering_shows_a_token_for_as_long(page):
    first = panel(page)
    page.hover("#explorer-words [data-token='4']")
    assert page.get_attribute("#explorer-panel", "data-token") == "4"
    page.hover("h1")
    assert panel(page) == first


def test_tokens_have_number_and_colour_of_their_first_expert(page, trace: RoutingTrace):
    page.select_option("#explorer-layer", label=f"{LAYERS[1]} (6 experts)")
    number = int(page.inner_text("#explorer-text option:checked").split()[0])
    rows = next(rows for rows in trace.rows([LAYERS[1]]) if int(rows.tokens.document_T[0]) == number)
    shown = page.eval_on_selector_all(
        "#explorer-words [data-token]",
        "spans => spans.map(span => [span.querySelector('small').textContent, getComputedStyle(span).backgroundColor])",
    )
    assert [int(expert) for expert, _ in shown] == rows.choice_TK[:, 0].tolist()
    assert len({expert for expert, _ in shown}) == len(set(map(tuple, shown)))  # one colour for each expert
    for colour in ("weight", "entropy"):
        page.select_option("#explorer-colour", colour)
        shades = page.eval_on_selector_all(
            "#explorer-words [data-token]", "spans => spans.map(s => s.style.background)"
        )
        assert len(set(shades)) > 2
    page.select_option("#explorer-colour", "expert")
    page.select_option("#explorer-layer", label="all layers")
    assert page.locator("#explorer-words [data-token] i").count() == len(shown)


def test_an_expert_of_the_legend_shows_only_its_tokens(page, trace: RoutingTrace):
    button = page.locator("#explorer-legend button").first
    expert = int(button.get_attribute("data-legend"))
    button.click()
    layer = int(page.inner_text("#explorer-layer option:checked").split()[0])
    number = int(page.inner_text("#explorer-text option:checked").split()[0])
    rows = next(rows for rows in trace.rows([layer]) if int(rows.tokens.document_T[0]) == number)
    here = (rows.choice_TK == expert).any(-1)
    faint = page.eval_on_selector_all(
        "#explorer-words [data-token]", "spans => spans.map(span => span.classList.contains('faint'))"
    )
    assert faint == (~here).tolist()
    assert page.evaluate("document.activeElement.dataset.legend") == str(expert)


def test_a_typed_text_is_found_in_all_texts(page):
    page.fill("#explorer-find", "T30 t12")  # two tokens that follow each other in both texts
    assert page.inner_text("#explorer-count") == "2 matches"
    rows = page.locator("#explorer-hits tbody tr")
    assert rows.count() == 2
    found = page.eval_on_selector_all("#explorer-words .found", "spans => spans.map(span => span.textContent)")
    assert [text.split()[0] for text in found] == ["t30", "t12"]
    before = page.input_value("#explorer-text")
    page.press("#explorer-find", "Enter")
    page.press("#explorer-find", "Enter")
    assert page.input_value("#explorer-text") != before
    assert page.evaluate("document.activeElement.textContent").startswith("t30")
    page.check("#explorer-filter")
    assert page.locator("#explorer-words [data-token]:visible").count() == 2
    page.locator("#explorer-words .found").first.click()
    page.keyboard.press("End")
    assert page.evaluate("document.activeElement.textContent").startswith("t12")
    page.keyboard.press("Home")
    assert page.evaluate("document.activeElement.textContent").startswith("t30")
    page.fill("#explorer-find", "not there")
    assert page.inner_text("#explorer-count") == "0 matches"
    page.fill("#explorer-find", "")
    assert page.locator("#explorer-words [data-token]:visible").count() in map(len, TEXTS.values())


def test_tables_are_saved_as_csv_and_all_numbers_as_json(page):
    numbers = json.loads(page.inner_text("#numbers"))
    buttons = page.eval_on_selector_all("button[data-csv]", "found => found.map(button => button.dataset.csv)")
    assert sorted(buttons) == sorted(numbers["tables"])
    layer = LAYERS[0]
    # Chromium lets a page save ten files at a time.
    for name in ("load", "balance", "parameters", f"tokens-layer-{layer}", f"coactivation-layer-{layer}"):
        with page.expect_download() as download:
            page.click(f"button[data-csv='{name}']")
        assert download.value.suggested_filename == f"{name}.csv"
        rows = list(csv.reader(io.StringIO(Path(download.value.path()).read_text(encoding="utf-8"))))
        table = numbers["tables"][name]
        assert rows[0] == table["columns"]
        assert len(rows) == len(table["rows"]) + 1
        for row, cells in zip(rows[1:], table["rows"], strict=True):
            assert row[0] == str(cells[0])
            for text, cell in zip(row, cells, strict=True):
                assert text == "" if cell is None else isinstance(cell, str) or float(text) == pytest.approx(cell)
    with page.expect_download() as download:
        page.click("#all-numbers")
    assert json.loads(Path(download.value.path()).read_text(encoding="utf-8")) == numbers


def test_a_layer_is_chosen_for_all_sections(page):
    choosers = page.locator("select.layer")
    assert choosers.count() > 1
    choosers.first.select_option(str(LAYERS[1]))
    assert {choosers.nth(index).input_value() for index in range(choosers.count())} == {str(LAYERS[1])}
    shown = page.eval_on_selector_all(
        "figure[data-layer]", "figures => figures.filter(f => !f.hidden).map(f => f.dataset.layer)"
    )
    assert set(shown) == {str(LAYERS[1])}


def test_plots_say_what_is_under_the_pointer(page):
    plot = page.locator("#figure-load svg")
    plot.scroll_into_view_if_needed()
    box, data = plot.bounding_box(), plot.evaluate("plot => ({...plot.dataset, width: plot.viewBox.baseVal.width})")
    scale = box["width"] / data["width"]
    x = box["x"] + scale * (float(data["x"]) + 2.5 * float(data["w"]))
    page.mouse.move(x, box["y"] + scale * (float(data["y"]) + 1.5 * float(data["h"])))
    cells = json.loads(page.inner_text("#numbers"))["tables"]["load"]["rows"][1]
    assert page.inner_text("#tip") == f"layer {cells[0]}, expert 2: {float(f'{cells[3]:.4g}'):g}"
    page.mouse.move(0, 0)
    assert not page.is_visible("#tip")


def test_the_page_fits_a_laptop_screen_and_a_phone(page):
    for width in (1366, 1024, 420):
        page.set_viewport_size({"width": width, "height": 768})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.set_viewport_size({"width": 1366, "height": 768})


def test_it_prints(page):
    page.emulate_media(media="print")
    assert page.locator(".controls").is_hidden()
    assert page.locator(".contents").is_hidden()
    assert page.locator("#explorer-words [data-token]").first.is_visible()
    assert page.locator("#figure-load svg").is_visible()
    content = page.pdf(format="A4")
    assert content.startswith(b"%PDF")
    assert content.count(b"/Type /Page\n") >= 3
    page.emulate_media(media="screen")


def test_it_is_complete_without_scripts(path: Path, context):
    scriptless = context.browser.new_context(java_script_enabled=False, viewport={"width": 1366, "height": 768})
    page = scriptless.new_page()
    page.goto(path.as_uri())
    assert page.get_by_role("table", name="Experts of the first tokens, by layer").is_visible()
    assert page.locator("#figure-load svg").is_visible()
    assert page.locator("figure:visible").count() == page.locator("figure").count()
    assert page.locator("button:visible").count() == 0
    scriptless.close()
