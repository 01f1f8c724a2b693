"""A small cluster of one machine: a network namespace for each rank, a bridge for each node, links with a rate.

    rank 0 --+                            +-- rank 2
             |-- node 0 ======== node 1 --|
    rank 1 --+          uplinks           +-- rank 3

Needs root, iproute2, and `htb`, `bfifo` and `u32` of the kernel. Each node is a namespace that holds a bridge; a rank's `eth0` ends there,
and each node's uplink ends at a switch, a namespace too. Every link is shaped in both directions by a token bucket, where
acknowledgements don't wait behind data that goes the same way. The kernel's own emulator of latency, `netem`, is not needed:
whoever wants latency waits before issuing messages.

Everything is named after the process that made it, and is removed when the block is left, also by Ctrl-C or SIGTERM. What a
process left that was killed (SIGKILL) is removed by the next one.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

PREFIX = "moesaic"
# A bucket of this size lets the first bytes of a message pass at full speed: rates show on messages some times larger.
BURST_BYTES = 16 * 1024
# Large packets, as in clusters: the token buckets of many links are work for few cores.
MTU = "9000"
# TCP that fills a link whatever others send: BBR, the default of some kernels, measures its rate instead, and two flows that
# share a link then leave part of it empty. Connections don't start over after each pause.
# Windows are larger than any message, which then waits in the link and not in a socket.
TCP = {
    "tcp_congestion_control": "reno",
    "tcp_slow_start_after_idle": "0",
    "tcp_wmem": "4096 16777216 33554432",
    "tcp_rmem": "4096 33554432 67108864",
}
# As much as waits in a link before packets are dropped; more than all ranks can have under way.
QUEUE_BYTES = 64 << 20


@dataclass
class Cluster:
    """Namespaces that exist, and what runs in them.

    Attributes:
        nodes: number of nodes.
        ranks_per_node: ranks on each; ranks are numbered node by node.
        uplink_mbit: rate of each node's link to the others, megabits a second in each direction.
        local_mbit: rate of each rank's link to its node.
        owner: id of the process that made it.
    """

    nodes: int
    ranks_per_node: int
    uplink_mbit: float
    local_mbit: float
    owner: int = field(default_factory=os.getpid)
    _processes: list[subprocess.Popen[bytes]] = field(default_factory=list, repr=False)

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.nodes * self.ranks_per_node

    def address(self, rank: int) -> str:
        """Where the others find a rank."""
        return f"10.77.{rank // self.ranks_per_node}.{rank % self.ranks_per_node + 1}"

    def rank_namespace(self, rank: int) -> str:
        """Namespace of a rank."""
        return _name(self.owner, f"rank{rank}")

    def node_namespace(self, node: int) -> str:
        """Namespace of a node's bridge."""
        return _name(self.owner, f"node{node}")

    def start(self, rank: int, command: Sequence[str], **values: object) -> subprocess.Popen[bytes]:
        """Run a command on a rank, in a process group of its own; further arguments as for `subprocess.Popen`."""
        found = dict(os.environ) | {"GLOO_SOCKET_IFNAME": "eth0", "TP_SOCKET_IFNAME": "eth0"}
        found |= values.pop("env", {})  # type: ignore[operator]
        process = subprocess.Popen(
            ["ip", "netns", "exec", self.rank_namespace(rank), *command],
            env=found,
            start_new_session=True,
            **values,  # type: ignore[call-overload]
        )
        self._processes.append(process)
        return process

    def cut(self, node: int) -> None:
        """Take a node's uplink down, without a word to anybody: packets are lost from now on."""
        # The switch's end: the node's own interface stays up, so that its kernel does not learn of it either.
        _ip("-n", _name(self.owner, "switch"), "link", "set", f"down{node}", "down")

    def mend(self, node: int) -> None:
        """Bring it up again."""
        _ip("-n", _name(self.owner, "switch"), "link", "set", f"down{node}", "up")

    def left_node(self, node: int) -> int:
        """Bytes that have left a node over its uplink since it was made, with all headers."""
        counter = "/sys/class/net/uplink/statistics/tx_bytes"
        return int(_run("ip", "netns", "exec", self.node_namespace(node), "cat", counter))

    def processes_inside(self) -> list[int]:
        """Ids of all processes in the ranks' namespaces, zombies too."""
        found = []
        for rank in range(self.world):
            listed = _ip("netns", "pids", self.rank_namespace(rank)).split()
            found += [int(pid) for pid in listed]
        return found

    def _make(self) -> None:
        switch = _name(self.owner, "switch")
        _ip("netns", "add", switch)
        _bridge(switch)
        for node in range(self.nodes):
            name = self.node_namespace(node)
            _ip("netns", "add", name)
            _bridge(name)
            _cable((name, "uplink"), (switch, f"down{node}"), self.uplink_mbit)
            _ip("-n", name, "link", "set", "uplink", "master", "bridge")
            _ip("-n", switch, "link", "set", f"down{node}", "master", "bridge")
        for rank in range(self.world):
            name, node = self.rank_namespace(rank), self.node_namespace(rank // self.ranks_per_node)
            _ip("netns", "add", name)
            _ip("-n", name, "link", "set", "lo", "up")
            settings = [f"net.ipv4.{key}={value}" for key, value in TCP.items()]
            _run("ip", "netns", "exec", name, "sysctl", "-q", "-w", *settings)
            _cable((name, "eth0"), (node, f"rank{rank}"), self.local_mbit)
            _ip("-n", node, "link", "set", f"rank{rank}", "master", "bridge")
            _ip("-n", name, "address", "add", f"{self.address(rank)}/16", "dev", "eth0")

    def _remove(self) -> None:
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        for process in self._processes:
            process.wait()
        _remove_namespaces(_name(self.owner, ""))


@contextlib.contextmanager
def cluster(nodes: int, ranks_per_node: int, *, uplink_mbit: float, local_mbit: float) -> Iterator[Cluster]:
    """Make a cluster, and remove it with all that runs in it when the block is left.

    SIGTERM and SIGHUP leave the block like Ctrl-C.

    Raises:
        SystemExit: without root, or where a tool is missing.
    """
    _check()
    _remove_leftovers()
    made = Cluster(nodes, ranks_per_node, uplink_mbit, local_mbit)
    before = {kind: signal.signal(kind, _leave) for kind in (signal.SIGTERM, signal.SIGHUP)}
    try:
        made._make()
        yield made
    finally:
        # A second Ctrl-C must not interrupt this.
        interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            made._remove()
        finally:
            for kind, handler in {**before, signal.SIGINT: interrupt}.items():
                signal.signal(kind, handler)


def _leave(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _check() -> None:
    missing = [tool for tool in ("ip", "tc", "sysctl") if shutil.which(tool) is None]
    if missing:
        raise SystemExit(f"needs {' and '.join(missing)}: install iproute2 and procps")
    if os.geteuid() != 0:
        raise SystemExit("making network namespaces needs root: run with sudo")


def _name(owner: int, part: str) -> str:
    return f"{PREFIX}-{owner}-{part}"


def _ip(*arguments: str) -> str:
    return _run("ip", *arguments)


def _run(*command: str) -> str:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}: {result.stderr.strip()}")
    return result.stdout


def _bridge(namespace: str) -> None:
    _ip("-n", namespace, "link", "add", "bridge", "type", "bridge", "forward_delay", "0")
    _ip("-n", namespace, "link", "set", "bridge", "up")


def _cable(one: tuple[str, str], other: tuple[str, str], mbit: float) -> None:
    """Two interfaces, the ends of one link, shaped where packets leave."""
    peer = ["peer", "name", other[1], "netns", other[0], "mtu", MTU]
    _ip("-n", one[0], "link", "add", one[1], "mtu", MTU, "type", "veth", *peer)
    for namespace, interface in (one, other):
        _shape(namespace, interface, mbit)
        _ip("-n", namespace, "link", "set", interface, "up")


def _shape(namespace: str, interface: str, mbit: float) -> None:
    """A token bucket for all packets; small ones, which are acknowledgements and what announces data, go first."""
    bucket = f"ceil {mbit}mbit burst {BURST_BYTES} cburst {BURST_BYTES}"
    small = "match ip protocol 6 0xff match u16 0x0000 0xff80 at 2"  # TCP whose length is below 128
    for words in (
        f"qdisc add dev {interface} root handle 1: htb default 20",
        f"class add dev {interface} parent 1: classid 1:1 htb rate {mbit}mbit {bucket}",
        f"class add dev {interface} parent 1:1 classid 1:10 htb prio 0 rate {mbit / 10}mbit {bucket}",
        f"class add dev {interface} parent 1:1 classid 1:20 htb prio 1 rate {mbit * 0.9}mbit {bucket}",
        f"qdisc add dev {interface} parent 1:10 bfifo limit {QUEUE_BYTES}",
        f"qdisc add dev {interface} parent 1:20 bfifo limit {QUEUE_BYTES}",
        f"filter add dev {interface} parent 1: protocol ip prio 1 u32 {small} flowid 1:10",
    ):
        _run("tc", "-n", namespace, *words.split())


def _namespaces() -> list[str]:
    return [line.split()[0] for line in _ip("netns", "list").splitlines() if line.startswith(f"{PREFIX}-")]


def _remove_leftovers() -> None:
    """Remove what processes left that are gone."""
    for name in _namespaces():
        if not Path(f"/proc/{name.split('-')[1]}").exists():
            _remove_namespaces(name)


def _remove_namespaces(prefix: str) -> None:
    names = [name for name in _namespaces() if name.startswith(prefix)]
    for name in names:
        for pid in _ip("netns", "pids", name).split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
    deadline = time.monotonic() + 5
    while any(_ip("netns", "pids", name).split() for name in names) and time.monotonic() < deadline:
        time.sleep(0.02)
    for name in names:
        _ip("netns", "delete", name)
