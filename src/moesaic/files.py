"""Writing files so that a reader finds either the old content or the whole new one, never half of it."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder; on success it is fsynced and renamed to `path`, on error removed.

    Raises:
        OSError: what the file system said (a full disk, a missing permission); `path` is then as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        _fsync(temporary)
        temporary.chmod(0o644)
        temporary.replace(path)
        _fsync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; on success all files in it are fsynced and it is renamed to `path`.

    An existing folder at `path` is replaced, and kept if anything fails. Between the two renames that replace it, a
    process that is killed leaves it beside `path`, in a hidden folder that ends in `.old`.

    Raises:
        OSError: what the file system said; `path` is then as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    try:
        yield temporary
        for file in temporary.rglob("*"):
            _fsync(file)
        _fsync(temporary)
        temporary.chmod(0o755)
        if path.exists():
            _replace_directory(path, temporary)
        else:
            temporary.rename(path)
        _fsync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def is_local(name: str | Path) -> bool:
    """Whether `name` exists here, or can only be a path: the name of a model on a hub has one slash at most."""
    path = Path(name).expanduser()
    return path.exists() or path.is_absolute() or str(name).startswith(".") or len(path.parts) > 2


def write_text(path: str | Path, text: str) -> None:
    """Write `text` to `path` atomically, UTF-8."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _replace_directory(path: Path, new: Path) -> None:
    """Put `new` in the place of `path`, or leave `path` as it was and raise."""
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path.parent))
    try:
        path.rename(aside / path.name)
        new.rename(path)
    except BaseException:
        if not path.exists():
            (aside / path.name).rename(path)
        # Not rmtree: if the old folder could not go back, it is still in there.
        with contextlib.suppress(OSError):
            aside.rmdir()
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
