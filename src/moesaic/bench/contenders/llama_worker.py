"""What runs in the interpreter that has `llama_cpp` and `gguf`: reads requests as lines of JSON, answers with lines.

Started as a file, since moesaic and torch need not be installed there.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any


def write_gguf(folder: str, target: str) -> None:
    """Make a GGUF file from the numbers and the index in `folder`."""
    import numpy as np

    gguf = importlib.import_module("gguf")

    content = json.loads((Path(folder) / "index.json").read_text(encoding="utf-8"))
    numbers = np.memmap(Path(folder) / "numbers.bin", dtype=np.uint8, mode="r")
    writer = gguf.GGUFWriter(target, content["architecture"])
    for key, value in content["metadata"].items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
        add(key, value)
    for tensor in content["tensors"]:
        *rows, last = tensor["shape"]
        size = last * tensor["width"]
        for count in rows:
            size *= count
        raw = numbers[tensor["start"] : tensor["start"] + size].reshape(*rows, last * tensor["width"])
        writer.add_tensor(tensor["name"], raw, raw_dtype=gguf.GGMLQuantizationType[tensor["type"]])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Runner:
    """A model of llama.cpp."""

    def __init__(self, path: str, threads: int, context: int) -> None:
        self._library = importlib.import_module("llama_cpp")
        self._model = self._library.Llama(
            path,
            n_ctx=context,
            n_batch=context,
            n_ubatch=context,
            n_threads=threads,
            n_threads_batch=threads,
            n_gpu_layers=0,
            verbose=False,
        )

    def logits(self, tokens: list[int], single: int) -> list[float]:
        """After the tokens, the last `single` of which are given one by one."""
        head = max(1, len(tokens) - single)
        self._model.reset()
        self._model.eval(tokens[:head])
        for token in tokens[head:]:
            self._model.eval([token])
        return self._logits().tolist()

    def generate(self, tokens: list[int], new: int) -> dict[str, Any]:
        """Greedy tokens, seconds until the first and for the rest."""
        self._model.reset()
        started = time.perf_counter()
        self._model.eval(tokens)
        found = [int(self._logits().argmax())]
        first = time.perf_counter()
        while len(found) < new:
            self._model.eval(found[-1:])
            found.append(int(self._logits().argmax()))
        return {"tokens": found, "first": first - started, "rest": time.perf_counter() - first}

    def _logits(self) -> Any:
        import numpy as np

        pointer = self._library.llama_get_logits_ith(self._model.ctx, -1)
        return np.ctypeslib.as_array(pointer, shape=(self._model.n_vocab(),))


def main() -> None:
    """Answer until the other side hangs up."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what llama.cpp prints must not stand among the answers
    runner: Any = None
    for line in sys.stdin:
        request = json.loads(line)
        action = request.pop("do")
        try:
            if action == "write":
                answer: Any = write_gguf(**request)
            elif action == "load":
                runner = Runner(**request)
                answer = runner._library.__version__
            else:
                answer = getattr(runner, action)(**request)
            reply = {"answer": answer}
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(reply) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
