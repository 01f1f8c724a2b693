"""Every command and example of the README and the documentation runs as printed.

The blocks of a page run in order in one temporary folder; its Python blocks share one namespace.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.docs.markdown_blocks import read_blocks
from tests.docs.served_command import served_command

ROOT = Path(__file__).parents[2]
PAGES = [str(path.relative_to(ROOT)) for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))]


@pytest.fixture(scope="session")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a `moesaic` that is quick to start."""
    with served_command(tmp_path_factory.mktemp("commands")) as folder:
        yield folder


@pytest.mark.parametrize("page", PAGES)
def test_page_runs_as_printed(
    page: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    subtests: pytest.Subtests,
    request: pytest.FixtureRequest,
) -> None:
    blocks = read_blocks((ROOT / page).read_text(encoding="utf-8"), page)
    with_commands = any(block.language == "bash" and block.no_run is None for block in blocks)
    commands = request.getfixturevalue("commands") if with_commands else None
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for block in blocks:
        if block.no_run is None:
            block.run(namespace, commands)
        else:
            with subtests.test():
                pytest.skip(f"{page}:{block.line}: {block.no_run}")
