"""A fault drill: processes are killed and a link is cut while a model trains; writes docs/benchmarks/fault-drill.md.

    sudo python benchmarks/fault_drill.py

Each drill runs the command line as a user would. Root is needed for the link only, which is cut between two "hosts" that
are network namespaces of this machine (see namespaces.py); without it that drill is left out, and the page not written.

Killed: two agents of `torchrun --nnodes=1:2` with one process each. Once the process alone is killed, which its agent starts
again; once with its agent, as when a host is lost. The losses of all steps are compared with a run that nothing happened to.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from namespaces import Cluster, cluster

from moesaic.files import write_text
from moesaic.papers.machine import describe_machine
from moesaic.train import read_metrics

PAGE = Path("docs/benchmarks/fault-drill.md")
MOESAIC, TORCHRUN = (str(Path(sys.executable).with_name(name)) for name in ("moesaic", "torchrun"))
STEPS, CHECKPOINT_EVERY, KILL_AFTER = 24, 5, 12
PEER_TIMEOUT = 8.0
# Seconds after that: a rank holds its error back for up to 6, lest it hide that of another one which knows the cause, and ends.
SAID, ENDED = 8.0, 12.0
RUN = f"""\
backbone: {{model_type: llama, hidden_size: 64, intermediate_size: 128, num_hidden_layers: 2, num_attention_heads: 4}}
moe:
  experts: {{num_experts: 8, intermediate_size: 64}}
  router: {{type: top_k, top_k: 2, normalize_top_k: true}}
  balance: [{{type: load_balancing, coefficient: 0.01, scope: batch}}]
data:
  sources: [{{type: python, domains: [prose], max_bytes: 400000}}]
  tokenizer: {{type: train_bpe, vocab_size: 512}}
  sequence_length: 128
  batch_size: 16
  validation_fraction: 0.1
parallel: {{ep: %EP%, timeout_seconds: {PEER_TIMEOUT:g}}}
train: {{steps: {STEPS}, checkpoint_every: {CHECKPOINT_EVERY}}}
"""
RENDEZVOUS = "join_timeout=60,last_call_timeout=2,keep_alive_interval=1,keep_alive_max_attempt=3"


@dataclass
class Drill:
    """What happened in a drill, as seconds since the fault, and whether that is what should happen.

    Attributes:
        name: for the page.
        facts: rows of its table.
        faults: what went wrong; empty if nothing did.
    """

    name: str
    facts: dict[str, str] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    def expect(self, condition: bool, otherwise: str) -> None:
        """Note a fault if the condition does not hold."""
        if not condition:
            self.faults.append(otherwise)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--keep", type=Path, help="folder for runs and logs; a temporary one by default")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        undisturbed = _undisturbed(folder)
        drills = [_killed(folder, undisturbed, with_agent=False), _killed(folder, undisturbed, with_agent=True)]
        if os.geteuid() == 0:
            drills.append(_cut(folder))
    for drill in drills:
        print(drill.name, json.dumps(drill.facts, indent=1), drill.faults or "as it should be", sep="\n")
    if os.geteuid() == 0:
        write_text(options.page, page(drills))
    if any(drill.faults for drill in drills):
        raise SystemExit(1)


# --- Killed processes -------------------------------------------------------------------------------------------------


def _config(folder: Path, ep: int) -> str:
    path = folder / f"run-ep{ep}.yaml"
    path.write_text(RUN.replace("%EP%", str(ep)), encoding="utf-8")
    return str(path)


def _train(folder: Path, name: str, ep: int = 1) -> list[str]:
    """The command that trains; all runs share the tokenised text."""
    return [MOESAIC, "train", _config(folder, ep), "-o", str(folder / name), "--cache", str(folder / "data")]


def _undisturbed(folder: Path) -> dict[int, float]:
    """Losses by step of one process that nothing happens to."""
    log = folder / "undisturbed.log"
    with log.open("wb") as file:
        subprocess.run(_train(folder, "undisturbed"), stdout=file, stderr=file, check=True, env=_environment())
    return _losses(folder / "undisturbed")


def _environment() -> dict[str, str]:
    # Agents that share their store publish its address in the first rendezvous only: one that joins later never learns it.
    own_store = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    return dict(os.environ) | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"} | own_store


def _losses(output: Path) -> dict[int, float]:
    """Training losses by step; a step that was made again counts as it was made last."""
    lines = read_metrics(output / "metrics.jsonl")
    return {line["step"]: line["loss"] for line in lines if line["type"] == "train"}


def _steps(output: Path) -> int:
    """Steps that the metrics know of by now."""
    try:
        return max(_losses(output), default=0)
    except (OSError, ValueError):
        return 0


@contextlib.contextmanager
def _agents(folder: Path, name: str, count: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Agents of torchrun, each with a process; killed with all they started when the block is left."""
    port = random.randint(20_000, 30_000)
    agents = []
    for index in range(count):
        command = [TORCHRUN, f"--nnodes=1:{count}", "--nproc-per-node=1", "--max-restarts=3", "--rdzv-backend=c10d"]
        command += [f"--rdzv-endpoint=127.0.0.1:{port}", f"--rdzv-id={name}", f"--rdzv-conf={RENDEZVOUS}"]
        command += ["--monitor-interval=0.1", "--no-python", *_train(folder, name)]
        with (folder / f"{name}-agent{index}.log").open("wb") as log:
            agents.append(subprocess.Popen(command, stdout=log, stderr=log, env=_environment(), start_new_session=True))
        time.sleep(1.0)  # the first one holds the rendezvous
    try:
        yield agents
    finally:
        for agent in agents:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(agent.pid, signal.SIGKILL)
            agent.wait()


def _children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()
    return [int(child) for child in found]


def _killed(folder: Path, undisturbed: dict[int, float], *, with_agent: bool) -> Drill:
    """Kill one process of two in the middle of a step, alone or with its agent."""
    who = "a process and its agent" if with_agent else "a process"
    name = "lost-host" if with_agent else "lost-process"
    drill = Drill(f"SIGKILL of {who}")
    output = folder / name
    with _agents(folder, name, 2) as agents:
        _wait(lambda: _steps(output) >= KILL_AFTER, 180, f"{name} did not come to step {KILL_AFTER}")
        # Half a step after the next line of the metrics: in the middle of a step.
        before = _steps(output)
        _wait(lambda: _steps(output) > before, 60, f"{name} stands still")
        lines = [line for line in read_metrics(output / "metrics.jsonl") if line["type"] == "train"]
        time.sleep(0.5 * lines[-1]["ranks"]["step_seconds"]["mean"])
        step = _steps(output)
        victims = _children(agents[1].pid)
        for pid in [*([agents[1].pid] if with_agent else []), *victims]:
            os.kill(pid, signal.SIGKILL)
        killed = time.monotonic()
        checkpoint, lowest = step // CHECKPOINT_EVERY * CHECKPOINT_EVERY, step

        def goes_on() -> bool:
            nonlocal lowest
            lowest = min(lowest, _steps(output))  # metrics after the checkpoint are taken back
            return _steps(output) > step or agents[0].poll() is not None

        _wait(goes_on, 180, f"{name} did not go on")
        drill.facts["steps made before"] = str(step)
        drill.facts["seconds until the next step"] = f"{time.monotonic() - killed:.1f}"
        code = agents[0].wait(timeout=300)
        drill.facts["exit code of the agent that was left"] = str(code)
        drill.expect(code == 0, f"the agent that was left ended with {code}")
        left = [pid for pid in victims if Path(f"/proc/{pid}").exists()]
        drill.expect(not left, f"processes {left} are still there")
    processes = _processes(output)
    drill.facts["processes"] = ", ".join(f"{count} from step {first} on" for count, first in processes)
    expected = [(2, 1), (1, checkpoint + 1)] if with_agent else [(2, 1)]
    drill.expect(processes == expected, f"processes were {processes} and not {expected}")
    losses = _losses(output)
    distance = max((abs(losses[step] - undisturbed[step]) for step in undisturbed if step in losses), default=1.0)
    drill.facts["resumed from the checkpoint of step"] = str(lowest)
    drill.expect(lowest == checkpoint, f"resumed from step {lowest} and not {checkpoint}")
    drill.facts["largest difference of a loss to the undisturbed run"] = f"{distance:.1e}"
    drill.expect(losses.keys() == undisturbed.keys(), "not every step has a loss")
    drill.expect(distance < 1e-5, f"losses differ by {distance:.1e}")
    return drill


def _processes(output: Path) -> list[tuple[int, int]]:
    """How many processes made the steps of the metrics, each time from which step on."""
    found: list[tuple[int, int]] = []
    for line in read_metrics(output / "metrics.jsonl"):
        if line["type"] == "train":
            count = line.get("ranks", {}).get("processes", 1)
            if not found or found[-1][0] != count:
                found.append((count, line["step"]))
    return found


def _wait(condition: Any, seconds: float, otherwise: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit(otherwise)
        time.sleep(0.02)


# --- A cut link -------------------------------------------------------------------------------------------------------


def _cut(folder: Path) -> Drill:
    """Cut the link between two hosts with two processes each, without a word to anybody."""
    drill = Drill("A link is cut")
    output = folder / "cut"
    with cluster(2, 2, uplink_mbit=1000, local_mbit=1000) as made:
        ranks = [_rank(folder, made, rank) for rank in range(made.world)]
        _wait(
            lambda: _steps(output) >= KILL_AFTER or any(rank.poll() is not None for rank in ranks),
            180,
            "the job between hosts did not come to the step at which the link is cut",
        )
        drill.expect(all(rank.poll() is None for rank in ranks), "a rank ended before the link was cut")
        made.cut(1)
        cut, said, ended = time.monotonic(), {}, {}
        logs = [folder / f"cut-rank{rank}.log" for rank in range(made.world)]
        while len(ended) < made.world and time.monotonic() < cut + 4 * PEER_TIMEOUT:
            for index, (rank, log) in enumerate(zip(ranks, logs, strict=True)):
                if index not in said and _message(log):
                    said[index] = time.monotonic() - cut
                if index not in ended and rank.poll() is not None:
                    ended[index] = time.monotonic() - cut
            time.sleep(0.02)
        for index, (rank, log) in enumerate(zip(ranks, logs, strict=True)):
            times = [f"{found[index]:.1f} s" if index in found else "never" for found in (said, ended)]
            drill.facts[f"rank {index}"] = f"error after {times[0]}, end after {times[1]}: {_message(log)}"
            drill.expect(index in said and said[index] < PEER_TIMEOUT + SAID, f"rank {index} did not say so in time")
            drill.expect(index in ended and ended[index] < PEER_TIMEOUT + ENDED, f"rank {index} did not end in time")
            drill.expect(rank.poll() not in (0, None), f"rank {index} ended with {rank.poll()}")
        left = made.processes_inside()
        drill.facts["processes left"] = str(len(left))
        drill.expect(not left, f"processes {left} are still there")
    return drill


def _rank(folder: Path, made: Cluster, rank: int) -> subprocess.Popen[bytes]:
    """A rank of the job, started without agents, which would have a link to lose of their own."""
    values = {
        "RANK": rank,
        "WORLD_SIZE": made.world,
        "LOCAL_RANK": rank % made.ranks_per_node,
        "LOCAL_WORLD_SIZE": made.ranks_per_node,
        "MASTER_ADDR": made.address(0),
        "MASTER_PORT": 29500,
    }
    with (folder / f"cut-rank{rank}.log").open("wb") as log:
        return made.start(
            rank,
            _train(folder, "cut", ep=2),
            stdout=log,
            stderr=log,
            env=_environment() | {name: str(value) for name, value in values.items()},
        )


def _message(log: Path) -> str:
    """The error in a log, without what the library of collectives adds; empty if there is none yet."""
    text = " ".join(log.read_text(encoding="utf-8", errors="replace").split())
    found = re.search(r"(rank \d+,? [^:]*: another process.*?timeout_seconds.*?\))", text)
    return found[1] if found else ""


# --- The page ---------------------------------------------------------------------------------------------------------


def page(drills: Sequence[Drill]) -> str:
    sections = "\n\n".join(_section(drill) for drill in drills)
    return f"""# Fault drill

Processes are killed and a link is cut while a small MoE trains over several processes.

<!-- no-run: takes minutes and needs root -->
```bash
sudo python benchmarks/fault_drill.py
```

Processes are killed half-way through a step of `torchrun --nnodes=1:2` with two agents of one process each, {STEPS} steps with a
checkpoint every {CHECKPOINT_EVERY}. torchrun starts all that are left again, and `moesaic train` goes on from the last checkpoint. The
losses of all {STEPS} steps are then compared with those of one process that nothing happened to; a run at another number of processes
sums in another order.

The link is that between two "hosts" with two processes each, network namespaces of this machine; packets are lost from one
moment on, and nobody is told. `parallel.timeout_seconds` is {PEER_TIMEOUT:g}; then a rank holds its error back for a moment, 3 seconds for
one of each host and 6 for others, so that one which knows the cause would speak first. The job has no agent, which would start it again.

Agents have `TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1`: agents of PyTorch 2.13 that share their store publish its address in their first
rendezvous only, and one that joins later waits for it in vain, as do the others for that one.

{sections}

Run on {describe_machine()}.
"""


def _section(drill: Drill) -> str:
    rows = "\n".join(f"| {name} | {_escaped(value)} |" for name, value in drill.facts.items())
    faults = "".join(f"\n- **Not as it should be**: {fault}" for fault in drill.faults)
    return f"## {drill.name}\n\n| | |\n|---|---|\n{rows}\n{faults}".rstrip()


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    main()
