"""Every router has its page, its row and its entry in the navigation, and the YAML that a page shows is valid."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from markdown_it import MarkdownIt
from tests.layer.router_rows import ROUTERS

from moesaic.layer import MoESpec, RouterConfig

ROOT = Path(__file__).parents[2]
TYPES = sorted(member.model_fields["type"].default for member in get_args(get_args(RouterConfig)[0]))
PAGES = sorted(path for path in (ROOT / "docs" / "routers").glob("*.md") if path.stem != "index")
# Of the examples whose fields fix it.
NUM_EXPERTS = {"modality": 8}


@pytest.mark.parametrize("kind", TYPES)
def test_router_is_documented_and_in_the_shared_matrix(kind: str) -> None:
    page, docs = f"{kind}.md", ROOT / "docs"
    assert (docs / "routers" / page).is_file()
    assert f"[`{kind}`]({page})" in (docs / "routers" / "index.md").read_text(encoding="utf-8")
    assert f"routers/{page}" in (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert kind in {row.values.get("type") for row in ROUTERS.values()}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_sections_shown_are_valid(page: Path) -> None:
    fences = [token for token in MarkdownIt().parse(page.read_text(encoding="utf-8")) if token.info == "yaml"]
    sections: list[dict[str, Any]] = [yaml.safe_load(token.content) for token in fences]
    shown = [section for section in sections if "router" in section]
    assert shown
    for section in shown:
        experts = {"num_experts": NUM_EXPERTS.get(page.stem, 256), "intermediate_size": 8}
        MoESpec.from_dict({"experts": experts, **section}, where="moe")
