"""llama.cpp through its Python package, in a process of its own, on the weights of the stock model."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moesaic.bench import gguf
from moesaic.bench.cases import Cell
from moesaic.bench.contenders.base import Entry, Unavailable
from moesaic.bench.contenders.model import ModelContender, ModelEntry
from moesaic.bench.models import BenchModel, Generated

_WORKER = Path(__file__).with_name("llama_worker.py")
_PACKAGES = ("llama_cpp", "gguf")


class LlamaCpp(ModelContender):
    """llama.cpp at the precision of the cell, with as many threads.

    Args:
        python: an interpreter that has `llama_cpp` and `gguf`, or None for this one.
    """

    name, family = "llama.cpp", "llama.cpp"

    def __init__(self, python: str | None) -> None:
        self._python = python

    def enter(self, cell: Cell, model: BenchModel) -> Entry:
        if torch.device(cell.device).type != "cpu":
            raise Unavailable("is compared on the CPU only")
        missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
        if self._python is None and missing:
            raise Unavailable(
                f"{' and '.join(missing)} not installed; pip install llama-cpp-python gguf, or name an interpreter "
                "that has them with --llama-cpp"
            )
        process = WorkerProcess(self._python or sys.executable)
        try:
            path = model.folder / "model.gguf"
            if not path.exists():
                gguf.hand_over(model.stock, model.folder)
                unfinished = path.with_suffix(".part")
                process.ask("write", folder=str(model.folder), target=str(unfinished))
                (model.folder / gguf.NUMBERS).unlink()
                unfinished.rename(path)
            context = max(256, cell.tokens + model.size.new_tokens)
            version = process.ask("load", path=str(path), threads=cell.threads, context=context)
        except BaseException:
            process.close()
            raise
        return _LlamaEntry(cell, model, process, version)


class _LlamaEntry(ModelEntry):
    def __init__(self, cell: Cell, model: BenchModel, process: WorkerProcess, version: str) -> None:
        super().__init__(cell, model)
        self._process = process
        self.note = f"llama-cpp-python {version}"

    def logits(self, prompt: list[int], single: int) -> Tensor:
        return torch.tensor(self._process.ask("logits", tokens=prompt, single=single))

    def generate(self, prompt: list[int], new_tokens: int) -> Generated:
        return Generated(**self._process.ask("generate", tokens=prompt, new=new_tokens))

    def close(self) -> None:
        self._process.close()


class WorkerProcess:
    """The process of `llama_worker`.

    Args:
        python: its interpreter.

    Raises:
        Unavailable: if it can't be started.
    """

    def __init__(self, python: str) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed by `close`)
        try:
            # A session of its own, so that Ctrl-C reaches only this process, which then ends it.
            self._process = subprocess.Popen(
                [python, str(_WORKER)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
                start_new_session=True,
            )
        except OSError as error:
            self._errors.close()
            raise Unavailable(f"{python} can't be started: {error.strerror}") from None

    def ask(self, action: str, **values: Any) -> Any:
        """The answer to a request.

        Raises:
            RuntimeError: what the other side says went wrong, or that it died, with the end of what it printed.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": action, **values}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise RuntimeError(f"its process died: {self._last_words()}")
        reply = json.loads(line)
        if "error" in reply:
            raise RuntimeError(reply["error"])
        return reply["answer"]

    def _last_words(self) -> str:
        self._errors.seek(0)
        return self._errors.read().decode(errors="replace")[-200:]

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.communicate()
        self._errors.close()
