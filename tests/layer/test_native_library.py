"""Building and loading the native library: with a compiler, without one, and when sources and library disagree."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from moesaic.layer.kernels.native import library

ROOT = Path(__file__).parents[2]
NATIVE = Path("src/moesaic/layer/kernels/native")

needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The files that a build needs, without a library."""
    shutil.copy(ROOT / "hatch_build.py", tmp_path)
    shutil.copytree(ROOT / NATIVE, tmp_path / NATIVE, ignore=shutil.ignore_patterns("*.so"))
    return tmp_path


def build(project: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "hatch_build.py"]
    return subprocess.run(
        command, cwd=project, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


def opened(project: Path) -> tuple[object, str]:
    return library.open_library(project / NATIVE / "libmoesaic.so", project / NATIVE / "csrc")


@needs_compiler
def test_sources_compile_without_a_warning_and_load(project: Path) -> None:
    run = build(project, CC="cc -Wextra -Werror")
    assert run.returncode == 0, run.stderr
    native, reason = opened(project)
    assert native is not None
    assert reason == ""
    # Changed sources, say after an update of an editable install, no longer fit.
    with (project / NATIVE / "csrc" / "isa.h").open("a") as header:
        header.write("\n")
    assert opened(project) == (None, "built from other sources: install moesaic again")


@pytest.mark.parametrize("compiler", ["false", "/no/such/compiler"])
def test_without_a_working_compiler_nothing_is_left_behind(project: Path, compiler: str) -> None:
    run = build(project, CC=compiler)
    assert run.returncode == 1
    assert "installing without native CPU kernels" in run.stderr
    assert not list((project / NATIVE).glob("*.so"))
    assert not [
        path for path in (project / NATIVE).iterdir() if path.is_dir() and path.name not in ("csrc", "__pycache__")
    ]
    assert opened(project) == (None, "not built: no C compiler when moesaic was installed")


def test_a_broken_library_is_refused_with_the_reason_of_the_system(project: Path) -> None:
    (project / NATIVE / "libmoesaic.so").write_bytes(b"no library")
    native, reason = opened(project)
    assert native is None
    assert "libmoesaic.so" in reason


def test_missing_library_is_said_once_and_another_kernel_runs(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    import torch

    from moesaic.errors import UnsupportedKernel
    from moesaic.layer import Experts, ExpertsConfig
    from moesaic.layer.kernels import selection

    def forget() -> None:
        for cached in (library.load, library._found, selection._chosen):
            cached.cache_clear()

    monkeypatch.setattr(library, "PATH", tmp_path / "libmoesaic.so")
    forget()
    try:
        config = ExpertsConfig(num_experts=2, intermediate_size=3)
        arguments = torch.ones(1, 4), torch.tensor([[0]]), torch.ones(1, 1)
        with caplog.at_level(logging.WARNING, logger="moesaic"), torch.no_grad():
            for _ in range(3):
                Experts(config, 4)(*arguments)
        assert [record.getMessage() for record in caplog.records] == [
            "native CPU kernels are not used (not built: no C compiler when moesaic was installed); "
            "experts run on torch's own operations"
        ]
        with pytest.raises(UnsupportedKernel, match="native: not built: no C compiler"):
            Experts(config.model_copy(update={"kernel": "native"}), 4)(*arguments)
    finally:
        monkeypatch.undo()
        forget()
