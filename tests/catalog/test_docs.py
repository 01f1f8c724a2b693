"""The page on presets shows what the catalog holds."""

from __future__ import annotations

from pathlib import Path

import pytest

from moesaic.catalog import preset, presets

PAGE = Path(__file__).parents[2] / "docs" / "presets.md"


@pytest.mark.parametrize("name", presets())
def test_page_shows_the_preset(name: str) -> None:
    found = preset(name)
    row = f"| `{name}` | "
    if found.published is not None:
        total, active = found.published.total, found.published.active
        row += f"{found.title} | {total.billions:g} B | "
        row += "- | - |" if active is None else f"{active.billions:g} B | {active.counts.replace('_', ' ')} |"
    assert row in PAGE.read_text(encoding="utf-8")
