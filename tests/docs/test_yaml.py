"""The YAML that pages show, apart from those of routers, is valid where it would stand."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from markdown_it import MarkdownIt
from torch.distributed.run import get_args_parser

from moesaic.catalog import preset
from moesaic.layer import MoESpec
from moesaic.train import RunConfig
from moesaic.train.model import check_architecture

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


def fenced(language: str) -> list[Any]:
    """Blocks of one kind in docs, with their place."""
    return [
        pytest.param(token.content, id=f"{page.stem}:{token.map[0] + 1}")
        for page in sorted((ROOT / "docs").rglob("*.md"))
        for token in MarkdownIt().parse(page.read_text(encoding="utf-8"))
        if token.info == language and token.map
    ]


@pytest.mark.parametrize("text", fenced("yml"))
def test_manifests_shown_run_a_command_that_exists(text: str) -> None:
    """Kubernetes manifests: YAML, whose containers call torchrun with arguments that it and we know."""
    found = [document for document in yaml.safe_load_all(text) if "containers" in str(document)]
    assert found
    for document in found:
        assert document["apiVersion"]
        assert document["kind"]
        [command] = commands_of(document)
        options = get_args_parser().parse_args(command[1:])
        assert options.training_script == "moesaic"
        assert options.module
        assert options.training_script_args[0] == "train"


def commands_of(value: Any) -> list[list[str]]:
    """Every `command` in a manifest."""
    if isinstance(value, list):
        return [found for part in value for found in commands_of(part)]
    if not isinstance(value, dict):
        return []
    own = [value["command"]] if "command" in value else []
    return own + [found for part in value.values() for found in commands_of(part)]


@pytest.mark.parametrize("text", fenced("sh"))
def test_scripts_shown_are_valid_shell(text: str) -> None:
    checked = subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True, check=False)
    assert checked.returncode == 0, checked.stderr


def test_there_are_some() -> None:
    assert len(shown()) >= 4
    assert len(fenced("yml")) >= 2
    assert len(fenced("sh")) >= 1


def test_recipes_are_runs_that_their_pages_show() -> None:
    recipes = sorted((ROOT / "docs" / "recipes").glob("*.yaml"))
    assert recipes
    for recipe in recipes:
        text = recipe.read_text(encoding="utf-8")
        assert text in (ROOT / "docs" / f"{recipe.stem}.md").read_text(encoding="utf-8")
        run = RunConfig.from_yaml(recipe)
        check_architecture(run)
        assert run.data.objective.type == "stages"


def test_the_recipe_of_openmoe_has_the_layers_of_the_preset() -> None:
    run, found = RunConfig.from_yaml(ROOT / "docs" / "recipes" / "openmoe.yaml"), preset("tiny-openmoe")
    assert run.moe is not None
    assert run.moe.model_copy(update={"capacity": None}) == found.moe
    assert isinstance(run.backbone, dict)
    assert run.backbone.items() <= found.backbone.items()
