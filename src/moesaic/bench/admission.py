"""Who may be timed: those who run and are right. What the others lack stands in their rows."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from moesaic.bench.contenders import Entry, Unavailable
from moesaic.bench.result import Row
from moesaic.bench.timing import describe

Wrong = Callable[[dict[str, Tensor]], str | None]


@dataclass
class Admitted:
    """Contenders that are ready.

    Attributes:
        entries: by name.
        warm: seconds that entering and the first run took.
    """

    entries: dict[str, Entry] = field(default_factory=dict)
    warm: dict[str, float] = field(default_factory=dict)

    def admit(self, row: Row, enter: Callable[[], Entry], wrong: Wrong) -> None:
        """Let a contender enter and run once.

        Args:
            row: gets the reason if it is not admitted.
            enter: gives its entry.
            wrong: says what is wrong with its outcome.
        """
        started = time.perf_counter()
        entry = None
        try:
            entry = enter()
            outcome = entry.outcome()
            reason = None if outcome is None else wrong(outcome)
        except Unavailable as error:
            row.status, row.reason = "unavailable", str(error)
            return
        except Exception as error:
            reason = describe(error)
        if entry is None or reason is not None:
            row.status, row.reason = "failed", reason or ""
            if entry is not None:
                entry.close()
            return
        row.note, row.default = entry.note, entry.default
        self.entries[row.name], self.warm[row.name] = entry, time.perf_counter() - started

    def close(self) -> None:
        """Close all entries."""
        for entry in self.entries.values():
            entry.close()
