"""All-to-all in one step and in two between two "hosts" with slow links: writes docs/benchmarks/two-hosts.md.

    sudo python benchmarks/two_hosts.py

Needs root, as hosts are network namespaces of this machine (see namespaces.py). What is timed are the exchanges of the
library, `Flat` and `Hierarchical`, in turns. Links have a rate but hardly any latency; `--latency` is added where messages are
issued: a rank waits so long before each message that leaves its node, one after the other. Beside each time stands what a
model of the links predicts, whose constants come from other exchanges than those it is held against.

Messages are sent point to point, receives posted first. Gloo's own `all_to_all_single` sends to a rank before it says that it
is ready to receive from it, so that ranks which don't start at the same moment send one after the other; the page shows it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from namespaces import BURST_BYTES, Cluster, cluster
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from moesaic.dist.exchange import Traffic
from moesaic.dist.exchange.flat import Flat
from moesaic.dist.exchange.hierarchical import Hierarchical
from moesaic.files import atomic_file, write_text
from moesaic.papers.machine import describe_machine

PAGE = Path("docs/benchmarks/two-hosts.md")
SIZES = [4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20, 8 << 20]
SMALL = 1 << 20  # below it there are more rounds, as a busy moment of the machine is long beside such an exchange
ROW_BYTES = 256
OWN_BYTES = 1 << 20  # what gloo's own all-to-all is timed with
NAMES = {"flat": "one step", "hierarchical": "two steps"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--ranks-per-node", type=int, default=2)
    parser.add_argument("--uplink-mbit", type=float, default=100)
    parser.add_argument("--local-mbit", type=float, default=1000)
    parser.add_argument("--latency", type=float, nargs="+", default=[0.0, 5.0], metavar="MS")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, metavar="BYTES", help="what a rank sends in all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--world", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank is not None:
        Rank(options).run()
        return
    found = {"machine": describe_machine(), "settings": _settings(options), **measure(options)}
    write_text(options.page.with_suffix(".json"), json.dumps(found, indent=1) + "\n")
    plot(found, options.page.with_suffix(".svg"))
    write_text(options.page, page(found))
    print(options.page.read_text(encoding="utf-8"))


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    names = ("nodes", "ranks_per_node", "uplink_mbit", "local_mbit", "latency", "sizes", "rounds")
    return {name: getattr(options, name) for name in names}


# --- Ranks ------------------------------------------------------------------------------------------------------------


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Start a rank in each namespace, and wait for what rank 0 writes."""
    with (
        cluster(
            options.nodes,
            options.ranks_per_node,
            uplink_mbit=options.uplink_mbit,
            local_mbit=options.local_mbit,
        ) as made,
        tempfile.TemporaryDirectory() as folder,
    ):
        answer = Path(folder) / "answer.json"
        world = {"address": made.address(0), "answer": str(answer), "owner": made.owner}
        ranks = [_start(made, rank, world) for rank in range(made.world)]
        while any(process.poll() is None for process in ranks) and not any(process.poll() for process in ranks):
            time.sleep(0.1)
        codes = [process.poll() for process in ranks]
        if codes != [0] * made.world:
            raise SystemExit(f"exit codes of the ranks: {codes} (None: still ran when another one had failed)")
        return json.loads(answer.read_text(encoding="utf-8"))


def _start(made: Cluster, rank: int, world: dict[str, Any]) -> subprocess.Popen[bytes]:
    own = [sys.executable, __file__, *sys.argv[1:], "--rank", str(rank), "--world", json.dumps(world)]
    return made.start(rank, own, env={"OMP_NUM_THREADS": "1"})


class Sent:
    """Messages under way."""

    def __init__(self, works: Sequence[Any]) -> None:
        self.works = works

    def wait(self) -> None:
        for work in self.works:
            work.wait()


class Wire:
    """Stands in for `all_to_all_single`, message by message.

    Attributes:
        latency: seconds that a rank waits before each message that leaves its node.
        own: leave everything to gloo.
    """

    def __init__(self, ranks_per_node: int) -> None:
        self.ranks_per_node, self.latency, self.own, self._call = ranks_per_node, 0.0, False, dist.all_to_all_single

    def __call__(self, output: Tensor, rows: Tensor, received: Any, sent: Any, group: Any, async_op: bool) -> Any:
        if self.own:
            return self._call(output, rows, received, sent, group=group, async_op=async_op)
        here, ranks = dist.get_rank(), dist.get_process_group_ranks(group)
        to, come = (
            dict(zip(ranks, rows.split(sent), strict=True)),
            dict(zip(ranks, output.split(received), strict=True)),
        )
        come[here].copy_(to[here])
        # Each rank begins with the one after it, so that not all send to the same one first.
        own = ranks.index(here)
        others = ranks[own + 1 :] + ranks[:own]
        works = [dist.irecv(come[peer], peer, group=group) for peer in others if len(come[peer])]
        for peer in (peer for peer in others if len(to[peer])):
            if self.latency and peer // self.ranks_per_node != here // self.ranks_per_node:
                time.sleep(self.latency)
            works.append(dist.isend(to[peer], peer, group=group))
        return Sent(works)


class Rank:
    """One process of the comparison."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.per_node, self.nodes = options, options.ranks_per_node, options.nodes
        self.size = self.per_node * self.nodes
        torch.set_num_threads(1)
        dist.init_process_group(
            "gloo",
            init_method=f"tcp://{options.world['address']}:29500",
            rank=options.rank,
            world_size=self.size,
            timeout=timedelta(seconds=60),
        )
        mesh = init_device_mesh("cpu", (self.nodes, self.per_node), mesh_dim_names=("node", "local"))
        self.traffic = Traffic(per_node=self.per_node)
        self.node, self.local = mesh.get_group("node"), mesh.get_group("local")
        assert dist.group.WORLD is not None
        self.movers = {
            "flat": Flat(dist.group.WORLD, self.traffic),
            "hierarchical": Hierarchical(self.node, self.local, self.traffic),
        }
        self.wire = dist.all_to_all_single = Wire(self.per_node)

    def run(self) -> None:
        """Check, measure, and let rank 0 write the answer."""
        equal = [self._same_rows(seed) for seed in range(6)]
        links = {name: self._link(group) for name, group in {"local": self.local, "uplink": self.node}.items()}
        rows = []
        for latency in self.options.latency:
            self.wire.latency = latency / 1e3
            rows.append({"latency": latency, "bytes": 0, **self._compare(None)})
            rows += [{"latency": latency, "bytes": size, **self._compare(size)} for size in self.options.sizes]
        self.wire.latency, self.wire.own = 0.0, True
        own = {"bytes": OWN_BYTES, **self._compare(OWN_BYTES)}
        found = {"exchanges_with_equal_bits": len(equal), "links": links, "rows": rows, "own": own}
        if self.options.rank == 0:
            Path(self.options.world["answer"]).write_text(json.dumps(found), encoding="utf-8")
        dist.barrier()
        dist.destroy_process_group()

    def _same_rows(self, seed: int) -> bool:
        """One exchange of even or uneven parts, some of them empty, there and back, in both ways: equal bits, or an end."""
        generator = torch.Generator().manual_seed(100 * seed + self.options.rank)
        sent_P = torch.full((self.size,), 5)
        if seed:
            sent_P = torch.randint(9, (self.size,), generator=generator) * (
                torch.rand(self.size, generator=generator) < 0.7
            )
        rows_SX = torch.randn(int(sent_P.sum()), 3, generator=generator)
        found = []
        for mover in self.movers.values():
            counts = mover.learn(sent_P).tolist()
            there_RX = mover.out(rows_SX, counts).wait()
            found.append((there_RX, mover.back(there_RX, counts, 0).wait()))
        (one, back), (other, other_back) = found
        if not (torch.equal(one, other) and torch.equal(back, rows_SX) and torch.equal(other_back, rows_SX)):
            raise SystemExit(f"rank {self.options.rank}: the two exchanges differ with seed {seed}")
        return True

    def _link(self, group: dist.ProcessGroup) -> dict[str, Any]:
        """Start-up time of a message and seconds a byte, from all-to-alls inside the group, all groups at once."""
        mover, samples = Flat(group), []
        for size in self.options.sizes:
            rows_SX, counts = _even(size, group.size())
            times = [self._time(lambda: mover.out(rows_SX, counts).wait()) for _ in range(self._rounds(size))]  # noqa: B023
            sent = rows_SX.numel() * rows_SX.element_size() * (group.size() - 1) // group.size()
            samples.append((sent, statistics.median(times)))
        return {"samples": samples, **_fit(samples, group.size() - 1)}

    def _compare(self, size: int | None) -> dict[str, Any]:
        """Times, bytes and messages of one exchange of `size` bytes a rank; of the counts before it if None."""
        calls: dict[str, Callable[[], object]] = {}
        for name, mover in self.movers.items():
            if size is None:
                calls[name] = lambda mover=mover: mover.learn(torch.ones(self.size, dtype=torch.int64))
            else:
                rows_SX, counts = _even(size, self.size)
                calls[name] = lambda mover=mover, rows_SX=rows_SX, counts=counts: mover.out(rows_SX, counts).wait()
        found: dict[str, Any] = {name: {"seconds": []} for name in calls}
        for name, call in calls.items():
            call()
            self.traffic.take()
            found[name]["bytes_on_uplink"] = self._on_uplink(call)
            count = self.traffic.take()
            for key in ("bytes", "bytes_between_nodes", "messages", "messages_between_nodes"):
                found[name][key] = getattr(count, key) // _REPEATS
        for round_ in range(self._rounds(size or 0)):
            names = list(calls) if round_ % 2 == 0 else list(calls)[::-1]
            for name in names:
                found[name]["seconds"].append(self._time(calls[name]))
        return found

    def _rounds(self, size: int) -> int:
        return self.options.rounds * (5 if size < SMALL else 1)

    def _time(self, call: Callable[[], object]) -> float:
        """Seconds from a moment that all ranks agree on until the last one is through; they share the machine's clock."""
        start = torch.tensor([time.monotonic() + 0.01], dtype=torch.float64)
        dist.all_reduce(start, dist.ReduceOp.MAX)
        time.sleep(max(0.0, start.item() - time.monotonic()))
        call()
        end = torch.tensor([time.monotonic()], dtype=torch.float64)
        dist.all_reduce(end, dist.ReduceOp.MAX)
        return (end - start).item()

    def _on_uplink(self, call: Callable[[], object]) -> float:
        """Bytes that leave the first node in a call, as its interface counts them, without those of the barriers."""

        def leaving(times: int) -> int:
            dist.barrier()
            before = self._counter()
            for _ in range(times):
                call()
            dist.barrier()
            time.sleep(0.02)  # acknowledgements that are still on their way
            return self._counter() - before

        nothing, with_calls = leaving(0), leaving(_REPEATS)
        return (with_calls - nothing) / _REPEATS

    def _counter(self) -> int:
        if self.options.rank:
            return 0
        return Cluster(self.nodes, self.per_node, 0, 0, owner=self.options.world["owner"]).left_node(0)


_REPEATS = 2


def _even(size: int, parts: int) -> tuple[Tensor, list[list[int]]]:
    """About `size` bytes in equal parts of whole rows, and the counts that both movers take."""
    rows = max(1, size // ROW_BYTES // parts)
    return torch.randn(rows * parts, ROW_BYTES // 4), [[rows] * parts] * 3


# --- The model --------------------------------------------------------------------------------------------------------


def _fit(samples: Sequence[tuple[int, float]], messages: int) -> dict[str, float]:
    """Seconds a byte from what is long beside the bucket's burst, seconds a message from the shortest exchange."""
    sent, seconds = np.array(samples, dtype=float).T
    long = sent >= 4 * BURST_BYTES
    beta, _ = np.polyfit(sent[long], seconds[long], 1)
    alpha = max(0.0, float(seconds[0])) / messages
    rest = seconds - alpha * messages - beta * sent
    r2 = 1 - float((rest**2).sum() / ((seconds - seconds.mean()) ** 2).sum())
    return {"alpha": alpha, "beta": float(beta), "r2": r2}


def predict(found: dict[str, Any], latency: float, size: int) -> dict[str, float]:
    """Seconds of both exchanges of `size` bytes a rank (SE-MoE, arXiv 2205.10034, section 4.3).

    One step: (n - 1) p messages leave the node. Two: n - 1 do, and all bytes but one part in p go over the node's links first.
    """
    n, p = found["settings"]["nodes"], found["settings"]["ranks_per_node"]
    local, uplink = found["links"]["local"], found["links"]["uplink"]
    alpha = uplink["alpha"] + latency / 1e3
    across = size * (n - 1) / n * uplink["beta"]
    inside = size * (p - 1) / p * local["beta"]
    return {
        "flat": (n - 1) * p * alpha + (p - 1) * local["alpha"] + across,
        "hierarchical": (p - 1) * local["alpha"] + inside + (n - 1) * alpha + across,
    }


# --- What is written --------------------------------------------------------------------------------------------------


def page(found: dict[str, Any]) -> str:
    settings, links = found["settings"], found["links"]
    n, p = settings["nodes"], settings["ranks_per_node"]
    flat, two = (statistics.median(found["own"][name]["seconds"]) for name in NAMES)
    own = f"{_bytes(OWN_BYTES)} take {1e3 * flat:.0f} ms in one step and {1e3 * two:.0f} in two"
    tables = "\n\n".join(_table(found, latency) for latency in settings["latency"])
    short, long = (
        [
            abs(predict(found, row["latency"], row["bytes"])[name] / statistics.median(row[name]["seconds"]) - 1)
            for row in found["rows"]
            if row["bytes"] and (row["bytes"] >= SMALL) == is_long
            for name in NAMES
        ]
        for is_long in (False, True)
    )
    fits = "\n".join(
        f"| {name} | {link['alpha'] * 1e6:.0f} | {link['beta'] * 1e9:.1f} | {1 / link['beta'] / 1e6:.1f} | {link['r2']:.4f} |"
        for name, link in links.items()
    )
    return f"""# Two hosts

The all-to-all in one step beside that in two steps, on {n} "hosts" with {p} ranks each: network namespaces of one machine, a
bridge for each host, links shaped by the kernel's token buckets. A host's uplink carries {settings["uplink_mbit"]:g} Mbit/s
in each direction, a rank's own link {settings["local_mbit"]:g}.

<!-- no-run: needs root -->
```bash
sudo python benchmarks/two_hosts.py
```

In one step a rank sends to each of the others. In two, rows first go inside the host to the rank with the destination's
local index, then between hosts: of {(n - 1) * p} messages that leave a host for each of its ranks, {n - 1} {"is" if n == 2 else "are"} left,
{p} times as long, and the same bytes; {(p - 1) / p:.0%} of all bytes go over the host's own links in addition. What arrives is the same bit
for bit: {found["exchanges_with_equal_bits"]} exchanges with even and uneven parts, there and back, are compared before anything is timed.

{tables}

The ratio is that of two steps to one; below 1 two steps are faster. Bytes are what one
rank sends in all, its own part included; "counts" is the exchange of sizes that goes before each one without a capacity. Time is from a common start until the last rank has everything, the median of
{settings["rounds"]} rounds in turns, of {5 * settings["rounds"]} below {_bytes(SMALL)}. Uplink is what leaves the first host for each exchange by its interface's own
counter, headers, acknowledgements and what is sent twice included; messages are those that leave the host, for each rank.

Latency is not the links' but added where messages are issued, without an emulator in the kernel: a rank waits that long
before each message that leaves its host, one after the other.

Messages go point to point, and a rank is ready to receive before it sends. Gloo's own `all_to_all_single` sends to a rank
first and then says that it is ready to receive from it; that word waits behind the data. So ranks that don't start at the same moment
send one after the other, and after the step inside a host they don't: with it, and without added latency,
{own}.

![Time over size, measured and predicted](two-hosts.svg)

## The model

```text
one step    (n-1) p a_x + (p-1) a_i + m (n-1)/n b_x
two steps   (n-1) a_x   + (p-1) a_i + m (n-1)/n b_x + m (p-1)/p b_i
```

m bytes a rank, n hosts, p ranks on each; a message takes a and a byte b, inside a host (i) or across (x), from SE-MoE
([2205.10034](https://arxiv.org/abs/2205.10034)). The constants come from all-to-alls inside each host and between ranks of
the same index, not from the exchanges above: a is the time of the shortest, b a straight line through those above
{4 * BURST_BYTES >> 10} KiB; the added latency is added to a_x. Ranks share their host's uplink, so b_x
is {p} times what a single sender sees.

| link | a, microseconds | b, ns a byte | MB/s | r² |
|---|---|---|---|---|
{fits}

From {_bytes(SMALL)} on, predicted times are off by {max(long):.1%} at most, below by {statistics.median(short):.0%} in the median: a is mostly
the start of an exchange on cores that all ranks share, which one step pays once and its formula twice, and a bucket lets
{BURST_BYTES >> 10} KiB pass at once.

Measured on {found["machine"]}; all ranks share its cores.
"""


def _table(found: dict[str, Any], latency: float) -> str:
    lines = [
        f"## {f'{latency:g} ms of latency for each message between hosts' if latency else 'Links as they are'}",
        "",
        "| bytes | one step, ms | two steps, ms | ratio | predicted | messages | uplink, KB |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in (row for row in found["rows"] if row["latency"] == latency):
        flat, two = (statistics.median(row[name]["seconds"]) for name in NAMES)
        expected = predict(found, latency, row["bytes"])
        predicted = "" if not row["bytes"] else " / ".join(f"{1e3 * expected[name]:.2f}" for name in NAMES)
        cells = [
            _bytes(row["bytes"]) if row["bytes"] else "counts",
            f"{1e3 * flat:.2f}",
            f"{1e3 * two:.2f}",
            f"{two / flat:.2f}",
            predicted,
            " / ".join(str(row[name]["messages_between_nodes"]) for name in NAMES),
            " / ".join(f"{row[name]['bytes_on_uplink'] / 1e3:,.1f}" for name in NAMES),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _bytes(count: int) -> str:
    return f"{count >> 20} MiB" if count >= 1 << 20 else f"{count >> 10} KiB"


def plot(found: dict[str, Any], path: Path) -> None:
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    latencies = found["settings"]["latency"]
    with matplotlib.rc_context({"svg.hashsalt": "moesaic", "svg.fonttype": "none", "font.size": 8}):
        figure = Figure(figsize=(4.5 * len(latencies), 3.4), layout="constrained")
        for axis, latency in zip(figure.subplots(1, len(latencies), squeeze=False)[0], latencies, strict=True):
            rows = [row for row in found["rows"] if row["latency"] == latency and row["bytes"]]
            sizes = [row["bytes"] for row in rows]
            for name, colour in zip(NAMES, ("#e08a00", "#00796b"), strict=True):
                times = [1e3 * statistics.median(row[name]["seconds"]) for row in rows]
                expected = [1e3 * predict(found, latency, size)[name] for size in sizes]
                axis.plot(sizes, times, "o", color=colour, markersize=4, label=f"{NAMES[name]}, measured")
                axis.plot(sizes, expected, "-", color=colour, linewidth=0.9, label=f"{NAMES[name]}, predicted")
            axis.set(xscale="log", yscale="log", xlabel="bytes a rank", title=f"{latency:g} ms added a message")
            axis.set_xticks(sizes, [_bytes(size) for size in sizes], rotation=45)
            axis.minorticks_off()
            axis.grid(alpha=0.3)
            axis.spines[["top", "right"]].set_visible(False)
        figure.axes[0].set_ylabel("ms")
        figure.axes[0].legend(frameon=False)
        FigureCanvasSVG(figure)
        with atomic_file(path) as temporary:
            figure.savefig(temporary, format="svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
