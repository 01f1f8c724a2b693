"""The routing report: sections made of figures, each a plot with the table behind it, written as one page."""

from __future__ import annotations

from moesaic.trace.report.page import Report, make_report, write_report
from moesaic.trace.report.parts import Figure, Section, Table
from moesaic.trace.report.subject import Named

__all__ = ["Figure", "Named", "Report", "Section", "Table", "make_report", "write_report"]
