"""Writing and reading hold no more than they promise, however long the trace: measured in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "trace_ten_million.py"


SNIPPET = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import trace_ten_million as script

before, path = script.peak_megabytes(), Path(sys.argv[2])
written = script.write(path, int(sys.argv[3]))
read = script.read(path, 0)
print(json.dumps([written["rows"], read["rows"], script.peak_megabytes() - before]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_two_million_rows_are_written_and_read_in_bounded_memory(tmp_path):
    rows = 2_000_000
    command = [sys.executable, "-c", SNIPPET, str(SCRIPT.parent), str(tmp_path / "x.trace"), str(rows)]
    written, read, added = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert rows <= written == read
    size = sum(file.stat().st_size for file in (tmp_path / "x.trace").iterdir())
    assert 15 < size / written < 45
    assert added < 250
