"""Writing and reading hold no more than they promise, however long the trace: measured in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "trace_ten_million.py"


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_two_million_rows_are_written_and_read_in_bounded_memory(tmp_path):
    path = tmp_path / "x.trace"
    rows = 2_000_000  # 146 MB in memory
    added = {}
    for stage in ("write", "read"):
        command = [sys.executable, str(SCRIPT), "--stage", stage, "--path", str(path), "--rows", str(rows)]
        ended = subprocess.run(command, check=True, capture_output=True, text=True)
        found = json.loads(ended.stdout)
        assert found["rows"] >= rows
        added[stage] = found["peak_mb"] - found["imports_mb"]
    size = sum(file.stat().st_size for file in path.iterdir())
    assert 15 < size / rows < 45
    assert added["write"] < 250
    assert added["read"] < 150
