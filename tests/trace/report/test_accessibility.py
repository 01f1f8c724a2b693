"""What readers with other eyes and hands need of the page."""

from __future__ import annotations

import itertools

import pytest
from tests.trace.models import tiny_model
from tests.trace.report.browser import open_browser, open_page
from tests.trace.report.reading import Tokenizer, make_trace

from moesaic.trace import account, write_report

CONTRAST = """
() => {
  const parse = (text) => { const [r, g, b, a = 1] = text.match(/[\\d.]+/g).map(Number); return { r, g, b, a }; };
  const over = (top, below) => ({
    r: top.r * top.a + below.r * (1 - top.a), g: top.g * top.a + below.g * (1 - top.a),
    b: top.b * top.a + below.b * (1 - top.a), a: 1,
  });
  const light = ({ r, g, b }) => {
    const [x, y, z] = [r, g, b].map((c) => (c /= 255) <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * x + 0.7152 * y + 0.0722 * z;
  };
  const ground = (element) => {
    const colours = [];
    for (let at = element; at; at = at.parentElement) colours.push(parse(getComputedStyle(at).backgroundColor));
    return colours.reverse().reduce((below, top) => over(top, below), { r: 255, g: 255, b: 255, a: 1 });
  };
  const poor = [];
  for (const element of document.querySelectorAll("body *")) {
    const words = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
    if (!words || !element.checkVisibility() || element.closest("script, style, noscript")) continue;
    const style = getComputedStyle(element);
    const colour = parse(element instanceof SVGElement ? style.fill : style.color);
    const [one, other] = [light(over(colour, ground(element))), light(ground(element))].sort((a, b) => b - a);
    const ratio = (one + 0.05) / (other + 0.05);
    if (ratio < 4.5) poor.push(`${element.tagName}.${element.className.baseVal ?? element.className} ${element.textContent.trim().slice(0, 20)}: ${ratio.toFixed(2)}`);
  }
  return poor;
}
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory):
    path = tmp_path_factory.mktemp("accessibility") / "routing.html"
    write_report(path, make_trace(), account(tiny_model()), title="tiny", tokenizer=Tokenizer())
    with open_browser() as context:
        page, errors = open_page(context, path)
        yield page
        assert errors == []


def test_landmarks_and_headings(page):
    for landmark in ("header", "nav", "main", "footer"):
        assert page.locator(landmark).count() == 1
    levels = page.eval_on_selector_all("h1, h2, h3, h4", "found => found.map(element => Number(element.tagName[1]))")
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    targets = page.eval_on_selector_all("nav a", "links => links.map(link => link.getAttribute('href').slice(1))")
    assert len(targets) > 3
    assert all(page.locator(f"[id='{target}']").count() == 1 for target in targets)


def test_controls_and_pictures_have_names(page):
    nameless = page.evaluate(
        """() => [...document.querySelectorAll("button, select, input, svg, [role=region], [role=listbox], [role=option]")]
            .filter((element) => element.checkVisibility())
            .filter((element) => !(element.getAttribute("aria-label") || element.labels?.length || element.textContent))
            .map((element) => element.outerHTML.slice(0, 80))"""
    )
    assert nameless == []
    assert page.locator("table:not(:has(caption))").count() == 0
    assert page.locator("th:not([scope])").count() == 0
    assert page.locator("img:not([alt])").count() == 0


@pytest.mark.parametrize("colour", ["expert", "weight", "entropy"])
def test_text_stands_out(page, colour: str):
    page.select_option("#explorer-colour", colour)
    assert page.evaluate(CONTRAST) == []


def test_faint_text_stands_out_too(page):
    page.select_option("#explorer-colour", "expert")
    page.locator("#explorer-legend button").first.click()
    assert page.evaluate(CONTRAST) == []
    page.locator("#explorer-legend button").first.click()


def test_all_is_reached_by_key_and_focus_is_seen(page):
    page.reload()
    reached, unseen = set(), []
    for _ in range(80):
        page.keyboard.press("Tab")
        tag, name, outline = page.evaluate(
            """() => { const at = document.activeElement; const style = getComputedStyle(at);
                return [at.tagName, at.id || at.className || at.dataset.token || "", style.outlineStyle + style.outlineWidth]; }"""
        )
        if tag == "BODY":
            break
        reached.add(name)
        if outline.startswith("none") or outline.endswith("none0px"):
            unseen.append((tag, name))
    assert unseen == []
    for control in ("text", "layer", "colour", "numbers", "find", "filter", "panel"):
        assert f"explorer-{control}" in reached
    assert {"csv", "layer"} <= reached
