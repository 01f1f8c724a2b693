"""Atomic files and folders: all of the new content or all of the old, and nothing temporary left behind."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from moesaic.files import atomic_directory, atomic_file, write_text


def full_disk(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def content(folder: Path) -> dict[str, str]:
    """Everything below `folder`, hidden files too."""
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write_half(temporary: Path, *, then: type[BaseException] | None = None) -> None:
    """Write something, then stop with an error."""
    temporary.write_text("half")
    if then is OSError:
        full_disk()
    if then is not None:
        raise then


def replace_file(path: Path, *, then: type[BaseException] | None = None) -> None:
    with atomic_file(path) as temporary:
        write_half(temporary, then=then)


def replace_folder(path: Path, *, then: type[BaseException] | None = None) -> None:
    with atomic_directory(path) as temporary:
        write_half(temporary / "file.txt", then=then)


# --- Files ------------------------------------------------------------------------------------------------------------


def test_file_appears_whole_with_its_folders(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file.txt"
    with atomic_file(path) as temporary:
        temporary.write_text("new")
        assert not path.exists()
        assert temporary.parent == path.parent  # a rename between file systems would not be atomic
    assert content(tmp_path) == {"a/b/file.txt": "new"}
    assert path.stat().st_mode & 0o777 == 0o644


def test_file_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    write_text(path, "old")
    write_text(path, "näu")
    assert path.read_text(encoding="utf-8") == "näu"
    assert entries(tmp_path) == ["file.txt"]


@pytest.mark.parametrize("existed", [True, False])
@pytest.mark.parametrize("stage", ["body", "write", "fsync", "rename"])
def test_failure_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, existed: bool) -> None:
    path = tmp_path / "file.txt"
    before = {"file.txt": "old"} if existed else {}
    if existed:
        path.write_text("old")
    targets = {"write": (Path, "write_text"), "fsync": (os, "fsync"), "rename": (Path, "replace")}
    with monkeypatch.context() as patch:
        if stage in targets:
            patch.setattr(*targets[stage], full_disk)
        with pytest.raises(OSError, match="No space left") as raised:
            replace_file(path, then=OSError if stage == "body" else None)
    assert raised.value.errno == errno.ENOSPC
    assert content(tmp_path) == before


def test_interrupt_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    write_text(path, "old")
    with pytest.raises(KeyboardInterrupt):
        replace_file(path, then=KeyboardInterrupt)
    assert content(tmp_path) == {"file.txt": "old"}


# --- Folders ----------------------------------------------------------------------------------------------------------


def test_folder_appears_whole_with_its_parents(tmp_path: Path) -> None:
    path = tmp_path / "a" / "run"
    with atomic_directory(path) as temporary:
        (temporary / "deep").mkdir()
        (temporary / "deep" / "file.txt").write_text("new")
        assert not path.exists()
    assert content(tmp_path) == {"a/run/deep/file.txt": "new"}
    assert path.stat().st_mode & 0o777 == 0o755
    assert entries(tmp_path / "a") == ["run"]


def test_folder_is_replaced_with_nothing_of_the_old_in_it(tmp_path: Path) -> None:
    path = tmp_path / "run"
    for name in ("old.txt", "new.txt"):
        with atomic_directory(path) as temporary:
            (temporary / name).write_text(name)
    assert content(tmp_path) == {"run/new.txt": "new.txt"}
    assert entries(tmp_path) == ["run"]


@pytest.mark.parametrize("existed", [True, False])
@pytest.mark.parametrize("stage", ["body", "write", "fsync", "first rename", "last rename"])
def test_failure_keeps_the_old_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, existed: bool
) -> None:
    path = tmp_path / "run"
    before = {"run/file.txt": "old"} if existed else {}
    if existed:
        path.mkdir()
        (path / "file.txt").write_text("old")
    rename = Path.rename

    def fail_on(source: Path, target: Path) -> Path:
        moves_new_in = source.suffix == ".tmp"
        if moves_new_in == (stage == "last rename" or not existed):
            full_disk()
        return rename(source, target)

    with monkeypatch.context() as patch:
        match stage:
            case "write":
                patch.setattr(Path, "write_text", full_disk)
            case "fsync":
                patch.setattr(os, "fsync", full_disk)
            case "first rename" | "last rename":
                patch.setattr(Path, "rename", fail_on)
        with pytest.raises(OSError, match="No space left"):
            replace_folder(path, then=OSError if stage == "body" else None)
    assert content(tmp_path) == before
    assert entries(tmp_path) == (["run"] if existed else [])


def test_interrupt_between_the_renames_puts_the_old_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, rename = tmp_path / "run", Path.rename
    path.mkdir()
    (path / "file.txt").write_text("old")

    def interrupt(source: Path, target: Path) -> Path:
        if source.suffix == ".tmp":
            raise KeyboardInterrupt
        return rename(source, target)

    monkeypatch.setattr(Path, "rename", interrupt)
    with pytest.raises(KeyboardInterrupt):
        replace_folder(path)
    assert content(tmp_path) == {"run/file.txt": "old"}
    assert entries(tmp_path) == ["run"]


def test_old_folder_that_cannot_go_back_is_never_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, rename = tmp_path / "run", Path.rename
    path.mkdir()
    (path / "file.txt").write_text("old")

    def only_aside(source: Path, target: Path) -> Path:
        return rename(source, target) if source == path else full_disk()  # type: ignore[return-value]

    monkeypatch.setattr(Path, "rename", only_aside)
    with pytest.raises(OSError, match="No space left"):
        replace_folder(path)
    assert list(content(tmp_path).values()) == ["old"]


def test_every_file_and_folder_reaches_the_disk_before_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    fsync = os.fsync

    def remember(descriptor: int) -> None:
        synced.append(os.path.realpath(f"/dev/fd/{descriptor}"))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", remember)
    with atomic_directory(tmp_path / "run") as temporary:
        (temporary / "deep").mkdir()
        (temporary / "deep" / "file.txt").write_text("new")
    assert set(synced) == {
        str(temporary / "deep"),
        str(temporary / "deep" / "file.txt"),
        str(temporary),
        str(tmp_path),
    }
