"""Tables of results: the columns, for the terminal and for Markdown."""

from __future__ import annotations

from moesaic.bench.result import CellResult, Row


def columns(result: CellResult) -> list[str]:
    """Headings of the table of one cell: medians, their interquartile range, and ratios, where less is faster.

    "/stock" is beside the best of transformers; "of bw" is the share of the measured bandwidth.
    """
    kind = result.cell.kind
    found = ["contender", "ms" if kind.timed else "MB", "IQR", "/dense", "/stock"]
    if kind.timed:
        found.append("/floor")
    if kind.cold:
        found += ["GB/s", "of bw"]
    return found


def values(result: CellResult, row: Row) -> list[str]:
    """The numbers of a measured row, as text."""
    scale, kind = (1e3 if result.cell.kind.timed else 1e-6), result.cell.kind
    found = [
        row.name,
        number(scale * row.median),
        number(scale * row.spread),
        ratio(result.ratio(row, result.dense)),
        ratio(result.ratio(row, result.best("transformers"))),
    ]
    if kind.timed:
        found.append(ratio(row.median / result.floor))
    if kind.cold and row.family == "dense":  # reads other bytes
        found += ["-", "-"]
    elif kind.cold:
        rate = result.weight_bandwidth(row)
        found += [f"{rate / 1e9:.1f}", f"{rate / result.rates.bandwidth:.0%}"]
    return found


def number(value: float) -> str:
    """Three digits that count."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def ratio(value: float | None) -> str:
    """A ratio, or a dash if one side was not measured."""
    return "-" if value is None else number(value)


def under(result: CellResult) -> list[str]:
    """The line below the table of a timed case: the floor and what it is made of; for models also tokens a second."""
    if not result.cell.kind.timed:
        return []
    rates, work = result.rates, result.work
    by = "bytes" if work.bytes / rates.bandwidth > work.flops / rates.gemm else "FLOPs"
    lines = [
        f"floor {number(1e3 * result.floor)} ms by {by}: {work.bytes / 1e6:,.0f} MB at {rates.bandwidth / 1e9:.1f} GB/s "
        f"({rates.bandwidth_by}), {work.flops / 1e9:.3g} GFLOP at {rates.gemm / 1e9:,.0f} GFLOP/s"
    ]
    if result.cell.kind.model:
        tokens = 1 if result.cell.kind.cold else result.cell.tokens
        speeds = [f"{row.name} {tokens / row.median:,.0f}" for row in result.rows if row.measured]
        lines.append(f"tokens/s: {', '.join(speeds)}")
    return lines


def remarks(result: CellResult) -> list[str]:
    """Notes on those who are measured, and why the others are not; those with the same reason in one line."""
    lines = [f"{row.name}: {row.note}" for row in result.rows if row.measured and row.note]
    by_reason: dict[str, list[str]] = {}
    for row in result.rows:
        if not row.measured:
            by_reason.setdefault(f"{row.status}: {row.reason}".removesuffix(": "), []).append(row.name)
    return lines + [f"{', '.join(names)}: {reason}" for reason, names in by_reason.items()]
