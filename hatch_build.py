"""Builds the native CPU kernels into the package; without a C compiler the package installs without them.

`python hatch_build.py` builds them in place, as an editable install does.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

NATIVE = Path(__file__).parent / "src" / "moesaic" / "layer" / "kernels" / "native"
# Floating-point contraction gives the portable code fused multiply-adds; nothing here reorders sums.
FLAGS = ["-std=c11", "-O3", "-fPIC", "-shared", "-ffp-contract=fast", "-fvisibility=default", "-Wall", "-Wextra"]


def compiler() -> list[str] | None:
    """The C compiler's command: $CC, or the first of cc, gcc and clang that exists."""
    if os.environ.get("CC"):
        return shlex.split(os.environ["CC"])
    found = next((path for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), None)
    return [found] if found else None


def fingerprint() -> str:
    """What the loader compares with the sources beside it. Importing the package here would import torch."""
    spec = importlib.util.spec_from_file_location("sources", NATIVE / "sources.py")
    assert spec is not None
    assert spec.loader is not None
    sources = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sources)
    return sources.fingerprint(NATIVE / "csrc")


def build() -> Path | None:
    """Compile the library in place; None and a line on stderr if that can't be done."""
    library = NATIVE / "libmoesaic.so"
    command = compiler()
    if platform.system() not in ("Linux", "Darwin") or command is None:
        print("moesaic: no C compiler here, installing without native CPU kernels", file=sys.stderr)
        return None
    with tempfile.TemporaryDirectory(dir=NATIVE) as folder:
        fresh = Path(folder) / library.name
        sources = sorted(str(path) for path in (NATIVE / "csrc").glob("*.c"))
        call = [*command, *FLAGS, f'-DMOESAIC_SOURCES="{fingerprint()}"', *sources, "-o", str(fresh), "-lm", "-pthread"]
        try:
            run = subprocess.run(call, capture_output=True, text=True, check=False)
            problem = run.stderr if run.returncode != 0 else None
        except OSError as error:
            problem = str(error)
        if problem is not None:
            print(f"moesaic: installing without native CPU kernels, {command[0]} failed:\n{problem}", file=sys.stderr)
            return None
        # A running process keeps the file it has mapped.
        fresh.replace(library)
    return library


if __name__ == "__main__":
    sys.exit(0 if build() else 1)
else:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface

    class CustomBuildHook(BuildHookInterface):
        """Called by hatchling for wheels and editable installs."""

        def initialize(self, version: str, build_data: dict) -> None:
            library = build()
            if library is not None:
                build_data["pure_python"] = False
                build_data["artifacts"].append(str(library.relative_to(self.root)))
                tag = sysconfig.get_platform().replace("-", "_").replace(".", "_")
                build_data["tag"] = f"py3-none-{tag}"
