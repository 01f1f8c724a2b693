"""What holds for the project as a whole: documentation, metadata, and which way imports go."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "moesaic"
MODULES = sorted(PACKAGE.rglob("*.py"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def run_python(code: str) -> str:
    """Standard output of `code` in a fresh interpreter."""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def normalised(requirement: str) -> str:
    """Name of a requirement as package indexes compare it, without extras and version."""
    name = re.split(r"[\[<>=!~ ;]", requirement, maxsplit=1)[0]
    return re.sub(r"[-_.]+", "-", name).lower()


def test_modules_and_public_names_have_docstrings():
    missing = []
    for path in MODULES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        name = str(path.relative_to(PACKAGE))
        if not ast.get_docstring(tree):
            missing.append(name)
        for node in tree.body:
            documented = isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            decorators = [ast.unparse(one) for one in node.decorator_list] if documented else []
            public = documented and "overload" not in decorators and not node.name.startswith("_")
            if public and not ast.get_docstring(node):
                missing.append(f"{name}: {node.name}")
    assert missing == []


def test_modules_stay_readable():
    lengths = {str(path.relative_to(PACKAGE)): len(path.read_text("utf-8").splitlines()) for path in MODULES}
    assert {name: length for name, length in lengths.items() if length > 450} == {}


def test_licence_and_metadata_agree():
    licence = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in licence
    assert "Version 2.0" in licence
    assert PROJECT["license"] == "Apache-2.0"


def test_version_agrees_with_package_and_changelog():
    version = run_python("import moesaic; print(moesaic.__version__)")
    assert version == PROJECT["version"]
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_constraints_pin_every_direct_dependency():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+(; platform_system == '\w+')?", line) for line in pins)
    extras = PROJECT["optional-dependencies"].values()
    direct = {normalised(name) for group in [PROJECT["dependencies"], *extras] for name in group}
    assert direct <= {normalised(line) for line in pins}


def test_layer_room_runs_without_transformers():
    # The package's own __init__ registers with transformers; a bare package stands in for it here.
    code = f"""
import importlib.util, sys, types
package = types.ModuleType("moesaic")
package.__path__ = [{str(PACKAGE)!r}]
sys.modules["moesaic"] = package
sys.modules["transformers"] = None  # importing it is an error
import torch
from moesaic.layer import MoEBlock, MoESpec
spec = {{"experts": {{"num_experts": 4, "intermediate_size": 8}}, "router": {{"top_k": 2}}}}
print(tuple(MoEBlock(MoESpec.from_dict(spec), 16)(torch.zeros(2, 3, 16)).shape))
"""
    assert run_python(code) == "(2, 3, 16)"


def test_importing_moesaic_needs_no_extra():
    extras = ["datasets", "tensorboard", "peft", "matplotlib", "lm_eval", "mkdocs", "pytest"]
    code = f"import sys, moesaic; print(*[name for name in {extras} if name in sys.modules])"
    assert run_python(code) == ""


def test_imports_point_down():
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "docs/getting-started.md"])
def test_make_targets_that_pages_name_exist(page: str):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):", makefile, flags=re.MULTILINE))
    named = set(re.findall(r"(?:^|`)make ([a-z]+)\b", (ROOT / page).read_text(encoding="utf-8"), flags=re.MULTILINE))
    assert named
    assert named <= targets
