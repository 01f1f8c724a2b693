"""A model of a cluster: memory and communication of every layout of a run, before any process starts."""

from moesaic.dist.plan.activations import Activations, MicroBatch, Section, measure_activations
from moesaic.dist.plan.communication import Flow, Sending
from moesaic.dist.plan.links import Cluster, Group, exchange_seconds, ring_seconds
from moesaic.dist.plan.memory import Memory, Rank, memory_of
from moesaic.dist.plan.planner import FORMULA, Candidate, Plan, Workload, plan
from moesaic.dist.plan.plot import draw_memory
from moesaic.dist.plan.quantities import Link, read_bytes, read_link, read_rate
from moesaic.dist.plan.report import parallel_yaml, tables
from moesaic.dist.plan.units import Part, Unit, units_of

__all__ = [
    "FORMULA",
    "Activations",
    "Candidate",
    "Cluster",
    "Flow",
    "Group",
    "Link",
    "Memory",
    "MicroBatch",
    "Part",
    "Plan",
    "Rank",
    "Section",
    "Sending",
    "Unit",
    "Workload",
    "draw_memory",
    "exchange_seconds",
    "measure_activations",
    "memory_of",
    "parallel_yaml",
    "plan",
    "read_bytes",
    "read_link",
    "read_rate",
    "ring_seconds",
    "tables",
    "units_of",
]
