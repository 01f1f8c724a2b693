"""Write a trace of ten million rows and summarise it: rows a second, bytes a row, and the most memory that took.

    python benchmarks/trace_ten_million.py
    python benchmarks/trace_ten_million.py --rows 1000000 --json

The rows are those of a model of 60 layers with 128 experts and 8 picks, in forward passes of 2,048 tokens: ids by Zipf's law,
picks that depend on them a little. They are made for one forward pass, and for each other one shifted and weighed anew, so
that they do not repeat and the time is mostly that of the trace. Writing, reading and summarising are each a process of its own,
with its own peak of resident memory: that of Python with torch and transformers, which stands beside it, and what was added.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from moesaic.trace import LayerFacts, Rows, TokenColumns, TraceFile, TraceHeader, TraceWriter, count, summarise

LAYERS, NUM_EXPERTS, TOP_K, TOKENS, LENGTH, VOCABULARY = 60, 128, 8, 2048, 1024, 50_000
HEADER = TraceHeader(
    model="synthetic",
    vocab_size=VOCABULARY,
    layers={index: LayerFacts(num_experts=NUM_EXPERTS, top_k=TOP_K, router="top_k") for index in range(LAYERS)},
    domains=("", "code", "prose"),
)


def forward_pass() -> list[Rows]:
    """The rows of one forward pass."""
    generator = torch.Generator().manual_seed(0)
    rank_V = torch.arange(1, VOCABULARY + 1, dtype=torch.float64)
    token_T = torch.multinomial(1 / rank_V, TOKENS, replacement=True, generator=generator)
    position_T = torch.arange(TOKENS, dtype=torch.int32) % LENGTH
    tokens = TokenColumns(
        document_T=torch.arange(TOKENS) // LENGTH,
        position_T=position_T,
        place_T=position_T,
        token_T=token_T.int(),
        domain_T=(torch.arange(TOKENS) // LENGTH % 2 + 1).short(),
        turn_T=torch.full((TOKENS,), -1, dtype=torch.int16),
        modality_T=torch.full((TOKENS,), -1, dtype=torch.int8),
    )
    found = []
    for layer in range(LAYERS):
        of_id_VN = torch.randn(997, NUM_EXPERTS, generator=generator)
        logits_TN = torch.randn(TOKENS, NUM_EXPERTS, generator=generator) + of_id_VN[token_T % 997]
        weight_TK, choice_TK = logits_TN.softmax(-1).topk(TOP_K, dim=-1)
        found.append(Rows(layer, tokens, choice_TK.short(), weight_TK))
    return found


def write(path: Path, rows: int) -> dict[str, Any]:
    """Write at least so many rows."""
    one = forward_pass()
    written, started = 0, time.perf_counter()
    with TraceWriter(path, HEADER) as writer:
        while written < rows:
            first = written // (LAYERS * LENGTH)
            tokens = replace(one[0].tokens, document_T=one[0].tokens.document_T + first)
            shift, weigh_T1 = written % NUM_EXPERTS, 0.5 + torch.rand(TOKENS, 1)
            for each in one:
                choice_TK = (each.choice_TK + shift) % NUM_EXPERTS
                writer.write(replace(each, tokens=tokens, choice_TK=choice_TK, weight_TK=each.weight_TK * weigh_T1))
                written += len(each)
    return {"rows": written, "seconds": time.perf_counter() - started}


def read(path: Path, rows: int) -> dict[str, Any]:
    """Read all rows."""
    started = time.perf_counter()
    found = sum(len(each) for each in TraceFile(path).rows())
    return {"rows": found, "seconds": time.perf_counter() - started}


def summary(path: Path, rows: int) -> dict[str, Any]:
    """Count all rows, and compute every metric that counts allow."""
    started = time.perf_counter()
    results = summarise(count(TraceFile(path)))
    seconds = time.perf_counter() - started
    return {"rows": len(TraceFile(path)), "seconds": seconds, "results": len(results)}


def peak_megabytes() -> float:
    """Most resident memory of this process so far, in 10^6 bytes."""
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        # Unlike that of getrusage it is not inherited from the process that started this one.
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024 / 1e6
    except (OSError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


STAGES = {"write": write, "read": read, "summary": summary}


def main() -> None:
    """Run the stages, each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--stage", choices=tuple(STAGES), help="run only this one, here, on --path")
    parser.add_argument("--path", type=Path)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if arguments.stage is not None:
        before = peak_megabytes()
        found = STAGES[arguments.stage](arguments.path, arguments.rows)
        print(json.dumps({**found, "peak_mb": peak_megabytes(), "imports_mb": before}))
        return
    from moesaic.papers.machine import describe_machine  # not in the stages, whose imports are measured

    report: dict[str, Any] = {"machine": describe_machine()}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ten-million.trace"
        for stage in STAGES:
            command = [sys.executable, __file__, "--stage", stage, "--path", str(path), "--rows", str(arguments.rows)]
            report[stage] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        size = sum(file.stat().st_size for file in path.iterdir())
        report["bytes_per_row"] = size / report["write"]["rows"]
    if arguments.json:
        print(json.dumps(report, indent=2))
        return
    for stage in STAGES:
        found = report[stage]
        rate, added = found["rows"] / found["seconds"], found["peak_mb"] - found["imports_mb"]
        print(
            f"{stage:7} {found['rows']:,} rows in {found['seconds']:5.1f} s, {rate:11,.0f} rows/s, peak "
            f"{found['peak_mb']:.0f} MB: {found['imports_mb']:.0f} MB of imports and {added:.0f} MB of the trace"
        )
    print(f"{report['bytes_per_row']:.1f} bytes a row\n{report['machine']}")


if __name__ == "__main__":
    main()
