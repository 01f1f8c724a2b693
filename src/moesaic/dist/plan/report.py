"""A plan as tables for a terminal, and as YAML to paste."""

from __future__ import annotations

import yaml
from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from moesaic.dist.plan.planner import FORMULA, Candidate, Plan
from moesaic.dist.plan.quantities import short

_SIZES = ("dp_replicate", "dp_shard", "ep", "esp")


def parallel_yaml(plan: Plan, candidate: Candidate) -> str:
    """The section of a run's YAML file that asks for a layout."""
    return yaml.safe_dump({"parallel": candidate.parallel(plan.config)}, sort_keys=False).rstrip()


def tables(plan: Plan, *, top: int = 10) -> Group:
    """What a person reads: layouts that fit, those that don't with the reason, and where the best one's time goes.

    Args:
        plan: what to show.
        top: how many layouts of each sort.
    """
    fitting = [candidate for candidate in plan.candidates if not candidate.misfit]
    others = [candidate for candidate in plan.candidates if candidate.misfit]
    shown: list[Table | Text] = []
    if fitting:
        shown.append(_fitting(plan, fitting, top))
        shown.append(_memory(fitting[0]))
        if fitting[0].flows:
            shown.append(_flows(fitting[0]))
    if others:
        shown.append(_misfits(others, top))
    stand_ins = {candidate.stand_in for candidate in plan.candidates if candidate.stand_in}
    shown += [Text(f"Note: {text}.", style="dim") for text in sorted(stand_ins)]
    return Group(*shown)


def _layout_table(title: str) -> Table:
    table = Table(title=title, title_justify="left", caption_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for name in _SIZES:
        table.add_column(name.replace("_", "\n"), justify="right", no_wrap=True)
    return table


def _sizes(candidate: Candidate) -> list[str]:
    return [str(getattr(candidate.layout, name)) for name in _SIZES]


def _fitting(plan: Plan, found: list[Candidate], top: int) -> Table:
    world, left = plan.cluster.world, len(found) - top
    more = f" ({left} more fit; --top {len(found)} shows them)" if left > 0 else ""
    table = _layout_table(f"Layouts of {world} ranks that fit, best first{more}")
    for heading in ("step", "tokens/s", "peak\nmemory", "sent\nin host", "sent\nbetween"):
        table.add_column(heading, justify="right", no_wrap=True)
    for candidate in found[:top]:
        table.add_row(
            *_sizes(candidate),
            seconds(candidate.seconds),
            short(plan.workload.tokens / candidate.seconds),
            f"{short(candidate.memory.peak)}B",
            f"{short(candidate.inner_bytes)}B",
            f"{short(candidate.outer_bytes)}B",
        )
    table.caption = f"{FORMULA}; bytes are those of one rank in one step"
    return table


def _memory(candidate: Candidate) -> Table:
    memory = candidate.memory
    table = Table(box=SIMPLE_HEAD, pad_edge=False, caption_justify="left")
    table.add_column("memory of a rank in the best one", no_wrap=True)
    table.add_column("size", justify="right", no_wrap=True)
    for name in ("parameters", "gradients", "optimizer", "activations", "buffers", "workspace"):
        table.add_row(name, f"{short(getattr(memory, name))}B")
    table.add_section()
    table.add_row(f"peak, in {memory.moment}", f"{short(memory.peak)}B")
    return table


def _flows(candidate: Candidate) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("what a rank sends in a step", no_wrap=True)
    for heading in ("ranks", "calls", "in host", "between", "time"):
        table.add_column(heading, justify="right", no_wrap=True)
    for hides, title in ((True, "beside computation"), (False, "computation waits for")):
        found = [flow for flow in candidate.flows if flow.hides == hides]
        if found:
            table.add_row(f"[italic]{title}")
        for flow in found:
            table.add_row(
                f"  {flow.name}",
                str(flow.size),
                str(flow.calls),
                f"{short(flow.inner)}B",
                f"{short(flow.outer)}B",
                seconds(flow.seconds),
            )
    table.add_section()
    table.add_row("compute", "", "", "", "", seconds(candidate.compute_seconds))
    return table


def _misfits(found: list[Candidate], top: int) -> Table:
    left = len(found) - top
    table = _layout_table(f"Layouts that do not fit{f' ({left} more)' if left > 0 else ''}")
    table.add_column("reason")
    for candidate in found[:top]:
        table.add_row(*_sizes(candidate), candidate.misfit)
    return table


def seconds(value: float) -> str:
    """A time with three digits and its unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value * 1e6:.3g} us"
