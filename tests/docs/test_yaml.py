"""The YAML that pages show, apart from those of routers, is valid where it would stand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from markdown_it import MarkdownIt

from moesaic.layer import MoESpec
from moesaic.train import RunConfig

ROOT = Path(__file__).parents[2]
BACKBONE = {"model_type": "llama", "hidden_size": 32}
MOE = {"experts": {"num_experts": 8, "intermediate_size": 8}, "router": {"type": "top_k", "top_k": 2}}


def shown() -> list[Any]:
    """Every YAML block of the README and of pages that are not a router's, with its place."""
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
    pages += sorted(path for path in (ROOT / "docs").rglob("*.md") if path.parent.name != "routers")
    return [
        pytest.param(token.content, id=f"{page.stem}:{token.map[0] + 1}")
        for page in pages
        for token in MarkdownIt().parse(page.read_text(encoding="utf-8"))
        if token.info == "yaml" and token.map
    ]


@pytest.mark.parametrize("text", shown())
def test_yaml_shown_is_valid(text: str) -> None:
    section = yaml.safe_load(text)
    if section.keys() <= MoESpec.model_fields.keys():
        section = {"moe": section}
    moe = {**MOE, **section["moe"]} if "moe" in section else None
    RunConfig.from_dict({"backbone": BACKBONE, **section, "moe": moe})


def test_there_are_some() -> None:
    assert len(shown()) >= 4
