"""A model of 60 layers of 1,000 experts: the page stays small, is made and opened fast, and shows all layers."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from tests.trace.report.browser import open_browser, open_page
from tests.trace.report.reading import SyntheticLog, Tokenizer

from moesaic.trace import write_report

LAYERS, EXPERTS = 60, 1000


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    log = SyntheticLog(layers=LAYERS, experts=EXPERTS, documents=5)
    begun = time.process_time()
    path = write_report(tmp_path_factory.mktemp("large") / "routing.html", log, title="large", tokenizer=Tokenizer())
    assert time.process_time() - begun < 60
    return path


def test_the_page_is_a_few_megabytes(path: Path):
    assert path.stat().st_size < 5_000_000


def test_it_opens_fast_and_all_layers_can_be_explored(path: Path):
    with open_browser() as context:
        begun = time.perf_counter()
        page, errors = open_page(context, path)
        page.wait_for_selector("#explorer-words [data-token='0']")
        assert time.perf_counter() - begun < 10
        assert page.evaluate("document.querySelectorAll('*').length") < 60_000
        assert page.locator("#explorer-panel tr[data-layer]").count() == LAYERS
        page.locator("#explorer-words [data-token='0']").click()
        begun = time.perf_counter()
        page.keyboard.press("ArrowRight")
        page.wait_for_function("document.getElementById('explorer-panel').dataset.token === '1'")
        assert time.perf_counter() - begun < 1
        assert page.locator("#explorer-layer option").count() == LAYERS + 1
        assert page.evaluate("document.documentElement.scrollWidth") <= 1366
        assert errors == []
