"""Where the processes of a group sit, and what collectives between them take: alpha + bytes * beta on each link."""

from __future__ import annotations

from dataclasses import dataclass

from moesaic.dist.plan.quantities import Link


@dataclass(frozen=True)
class Cluster:
    """Machines that are all alike; ranks fill one host after the other.

    Attributes:
        hosts: number of hosts.
        gpus: devices of a host, one process each.
        memory: bytes of a device.
        flops: floating-point operations a second that a device reaches in training.
        inner: link of a device to others of its host.
        outer: link of a device to other hosts.
        headroom: share of the memory to leave free: the driver, communication libraries and fragmentation need some.
        overlap: share of the compute time behind which gathering parameters and reducing gradients can hide.
    """

    hosts: int
    gpus: int
    memory: float
    flops: float
    inner: Link
    outer: Link
    headroom: float = 0.1
    overlap: float = 1.0

    @property
    def world(self) -> int:
        """Number of processes."""
        return self.hosts * self.gpus

    def group(self, stride: int, size: int) -> Group:
        """The group of every stride-th rank that spans most hosts."""
        if size == 1:
            return Group(1, 1)
        hosts = max(
            len({(first + stride * member) // self.gpus for member in range(size)})
            for first in range(self.world)
            if first // stride % size == 0
        )
        return Group(size, hosts)


@dataclass(frozen=True)
class Group:
    """Processes that communicate, spread evenly over hosts.

    Attributes:
        size: number of processes.
        hosts: hosts they are on.
    """

    size: int
    hosts: int

    @property
    def local(self) -> float:
        """Processes on one host."""
        return self.size / self.hosts


def ring_seconds(sent: float, group: Group, inner: Link, outer: Link, *, rounds: int = 1) -> float:
    """Time of an all-gather or reduce-scatter (an all-reduce is both: 2 rounds).

    A ring in rank order takes size - 1 steps a round. Of its `size` edges `hosts` lead to another host, and rings that
    begin at different processes share these evenly; both kinds of link work at the same time.

    Args:
        sent: bytes that each process sends in all rounds.
        group: who takes part.
        inner: link within hosts.
        outer: link between hosts.
        rounds: how often the ring is walked.
    """
    if group.size == 1:
        return 0.0
    inside, between = ring_split(sent, group)
    slowest = outer if group.hosts > 1 else inner
    return rounds * (group.size - 1) * slowest.latency + max(
        inside * inner.seconds_per_byte, between * outer.seconds_per_byte
    )


def ring_split(sent: float, group: Group) -> tuple[float, float]:
    """Bytes to processes of the same host and to those of other hosts, on the average of the ring's processes."""
    share = group.hosts / group.size if group.hosts > 1 else 0.0
    return sent * (1 - share), sent * share


def exchange_split(buffer: float, group: Group, *, hierarchical: bool) -> tuple[float, float]:
    """Bytes that a process sends in an all-to-all of equal parts: within its host, and to other hosts.

    Args:
        buffer: bytes for all processes of the group, itself included.
        group: who takes part.
        hierarchical: in two phases, the first of which also carries within the host what is for other hosts.
    """
    between = buffer * (group.hosts - 1) / group.hosts
    within = buffer * (group.local - 1) / (group.local if hierarchical else group.size)
    return within, between


def exchange_seconds(buffer: float, group: Group, inner: Link, outer: Link, *, hierarchical: bool) -> float:
    """Time of an all-to-all of equal parts, by the model of SE-MoE (arXiv 2205.10034, section 4; n hosts of p processes).

    flat: (n-1) p alpha_x + (p-1) alpha_i + max(m (n-1)/n beta_x, m (p-1)/(n p) beta_i)
    hierarchical: (p-1) alpha_i + m (p-1)/p beta_i + (n-1) alpha_x + m (n-1)/n beta_x

    m is the buffer, x the link between hosts and i that within. Messages of the flat one leave on both links at once;
    the phases of the hierarchical one follow each other, and its messages between hosts are fewer and p times larger.
    """
    within, between = exchange_split(buffer, group, hierarchical=hierarchical)
    messages = (group.hosts - 1) * (1 if hierarchical else group.local)
    waiting = messages * outer.latency + (group.local - 1) * inner.latency
    times = within * inner.seconds_per_byte, between * outer.seconds_per_byte
    return waiting + (sum(times) if hierarchical else max(times))
