"""Finding and running the fenced `python` and `bash` blocks of a Markdown page.

A block runs unless an HTML comment `<!-- no-run: reason -->` stands right before it.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt

_NO_RUN = re.compile(r"<!--\s*no-run:(?P<reason>.*?)-->", re.DOTALL)


@dataclass(frozen=True)
class Block:
    """One fenced block.

    Attributes:
        page: where it stands, for messages.
        line: line of its opening fence, from 1.
        language: "python" or "bash".
        source: its text.
        no_run: why it is not run; None if it is.
    """

    page: str
    line: int
    language: str
    source: str
    no_run: str | None = None

    def run(self, namespace: dict[str, Any], commands: Path | None = None) -> None:
        """Run in the current folder; Python blocks read and write `namespace`, bash blocks look in `commands` first.

        Raises:
            AssertionError: if a bash block fails, with its output.
            Exception: whatever a Python block raises.
        """
        if self.language == "python":
            # Line numbers of tracebacks are those of the page.
            exec(compile("\n" * self.line + self.source, self.page, "exec"), namespace)
        else:
            _run_bash(self, commands)


def read_blocks(text: str, page: str) -> list[Block]:
    """The `python` and `bash` blocks of a page in order.

    Raises:
        ValueError: for a no-run comment that gives no reason or does not stand right before such a block.
    """
    blocks: list[Block] = []
    pending: tuple[int, str] | None = None
    for token in MarkdownIt().parse(text):
        if token.map is None:
            continue
        line = token.map[0] + 1
        language = (token.info.split() or [""])[0]
        runnable = token.type == "fence" and language in ("python", "bash")
        if pending is not None and not runnable:
            raise ValueError(f"{page}:{pending[0]}: no python or bash block follows this no-run comment")
        comment = _NO_RUN.match(token.content.strip()) if token.type == "html_block" else None
        if runnable:
            blocks.append(Block(page, line, language, token.content, pending[1] if pending else None))
            pending = None
        elif comment is not None:
            pending = line, comment["reason"].strip()
            if not pending[1]:
                raise ValueError(f"{page}:{line}: a no-run comment must give its reason")
    if pending is not None:
        raise ValueError(f"{page}:{pending[0]}: no python or bash block follows this no-run comment")
    return blocks


def _run_bash(block: Block, commands: Path | None) -> None:
    folders = [str(folder) for folder in (commands, Path(sys.executable).parent) if folder is not None]
    result = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block.source],
        env={**os.environ, "PATH": os.pathsep.join([*folders, os.environ["PATH"]])},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert result.returncode == 0, f"{block.page}:{block.line} exited {result.returncode}:\n{result.stdout}"
