"""Peak memory of one step of one contender, in a fresh process: `python -m moesaic.bench.memory REQUEST`.

The request is JSON on the command line and the answer JSON on stdout. Weights and inputs are there beforehand, so what
counts is activations, gradients and scratch space.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from moesaic.bench.cases import Cell
from moesaic.bench.check import fault, reference
from moesaic.bench.contenders import LayerContender, Unavailable, contenders
from moesaic.bench.inputs import Layers
from moesaic.bench.shapes import Shape
from moesaic.bench.timing import describe

_WARM = Shape(hidden=64, width=32, experts=4, picks=2)


def step_memory(name: str, cell: Cell, seed: int) -> dict[str, Any]:
    """Bytes by which a step raises the peak above what is in use before it.

    Args:
        name: of the contender.
        cell: what is computed.
        seed: of the inputs.

    Returns:
        `bytes`, `note` and `default`; or `status` and `reason` if it can't run or is wrong.
    """
    person = next(one for one in contenders() if one.name == name and one.takes(cell))
    assert isinstance(person, LayerContender)
    if cell.threads:
        torch.set_num_threads(cell.threads)
    try:
        # Libraries load code and make their pools in the first call.
        small = replace(cell, shape=_WARM, tokens=8)
        person.enter(small, Layers(seed).inputs(small)).outcome()
        inputs = Layers(seed).inputs(cell)
        entry = person.enter(cell, inputs)
        before = reset_peak(cell.device)
        outcome = entry.outcome()
        used = peak(cell.device) - before
    except Unavailable as error:
        return {"status": "unavailable", "reason": str(error)}
    except Exception as error:
        return {"status": "failed", "reason": describe(error)}
    if outcome is not None:
        reason = fault(outcome, reference(cell, inputs.calls[0]), cell.torch_dtype)
        if reason is not None:
            return {"status": "failed", "reason": reason}
    return {"bytes": used, "note": entry.note, "default": entry.default}


def reset_peak(device: str) -> int:
    """Start a new peak, and return the bytes in use.

    Raises:
        Unavailable: where the system can't tell: on a CPU it must be Linux.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets VmHWM, see proc(5)
        return _status("VmRSS")
    except OSError as error:
        raise Unavailable(f"peak memory needs /proc of Linux ({error.strerror})") from None


def peak(device: str) -> int:
    """The most bytes in use since `reset_peak`."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    return _status("VmHWM")


def _status(key: str) -> int:
    """A size of this process in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0]) * 1024
    raise OSError(0, f"/proc/self/status has no {key}")


def main() -> None:
    """Answer the request on the command line."""
    request = json.loads(sys.argv[1])
    print(json.dumps(step_memory(request["name"], Cell.from_dict(request["cell"]), request["seed"])))


if __name__ == "__main__":
    main()
