"""Every command and example of the README and the documentation runs as printed.

The blocks of a page run in order in one temporary folder; its Python blocks share one namespace.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.docs.markdown_blocks import read_blocks

ROOT = Path(__file__).parents[2]
PAGES = [str(path.relative_to(ROOT)) for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))]


@pytest.mark.parametrize("page", PAGES)
def test_page_runs_as_printed(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, subtests: pytest.Subtests
) -> None:
    blocks = read_blocks((ROOT / page).read_text(encoding="utf-8"), page)
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for block in blocks:
        if block.no_run is None:
            block.run(namespace)
        else:
            with subtests.test():
                pytest.skip(f"{page}:{block.line}: {block.no_run}")
