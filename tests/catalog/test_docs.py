"""The pages on presets and on the catalogue show what the catalog holds."""

from __future__ import annotations

from pathlib import Path

import pytest

from moesaic.catalog import mechanisms, models, preset, presets
from moesaic.catalog.page import filled
from moesaic.errors import ConfigError

DOCS = Path(__file__).parents[2] / "docs"
PAGE = DOCS / "presets.md"


@pytest.mark.parametrize("name", presets())
def test_page_shows_the_preset(name: str) -> None:
    found = preset(name)
    row = f"| `{name}` | "
    if found.published is not None:
        total, active = found.published.total, found.published.active
        row += f"{found.title} | {total.billions:g} B | "
        row += "- | - |" if active is None else f"{active.billions:g} B | {active.counts.replace('_', ' ')} |"
    assert row in PAGE.read_text(encoding="utf-8")


def test_page_of_the_catalogue_is_up_to_date() -> None:
    """If not: python -m moesaic.catalog.page docs/catalog.md"""
    page = (DOCS / "catalog.md").read_text(encoding="utf-8")
    assert filled(page) == page


def test_page_of_the_catalogue_shows_every_entry_with_its_page() -> None:
    page = (DOCS / "catalog.md").read_text(encoding="utf-8")
    for entry in mechanisms():
        line = next(line for line in page.splitlines() if line.lstrip().startswith(f"- `{entry.name}` "))
        assert entry.page is None or f"]({entry.page})" in line
    assert all(f"| `{record.name}` | " in page for record in models())


def test_readme_counts_right() -> None:
    readme = (DOCS.parent / "README.md").read_text(encoding="utf-8")
    assert f"{len(mechanisms())} mechanisms and {len(models())} published models" in readme


def test_a_page_without_markers_is_refused() -> None:
    with pytest.raises(ConfigError, match="has no markers in it"):
        filled("# A page")
