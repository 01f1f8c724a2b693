"""What was measured, and the ratios that follow from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from moesaic.bench.cases import Cell
from moesaic.bench.contenders import Contender
from moesaic.bench.rates import Rates
from moesaic.bench.statistics import median, spread
from moesaic.bench.timing import time_in_turns
from moesaic.bench.work import Work

if TYPE_CHECKING:
    from moesaic.bench.admission import Admitted

Status = Literal["measured", "failed", "unavailable", "not reached"]


@dataclass
class Row:
    """One contender in one cell.

    Attributes:
        name: of the contender.
        family: of the contender.
        status: "failed" is one that raised or computed something wrong, "unavailable" one that can't run here,
            "not reached" one that an interruption came before.
        reason: why it is not measured.
        note: what a reader should know.
        default: whether it is what its family does when nobody chooses: the kernel that "auto" takes.
        samples: one number a round, in the unit of the case: seconds a call, or bytes.
        facts: more, such as the tokens that a model generated.
    """

    name: str
    family: str
    status: Status
    reason: str = ""
    note: str = ""
    default: bool = False
    samples: list[float] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def measured(self) -> bool:
        """Whether it has numbers."""
        return self.status == "measured"

    @property
    def median(self) -> float:
        """The middle of the samples."""
        return median(self.samples)

    @property
    def spread(self) -> float:
        """Interquartile range of the samples."""
        return spread(self.samples)


@dataclass
class CellResult:
    """A comparison.

    Attributes:
        cell: what was compared.
        work: the least that a call has to do.
        rates: of the machine, measured just before and after.
        rows: everyone, in the order of tables.
        facts: how the inputs were made.
        finished: False until all rounds are there.
    """

    cell: Cell
    work: Work
    rates: Rates
    rows: list[Row]
    facts: dict[str, Any] = field(default_factory=dict)
    finished: bool = False

    @classmethod
    def empty(cls, cell: Cell, people: Sequence[Contender], rates: Rates) -> CellResult:
        """Nothing measured yet, with a row for everyone who takes the cell."""
        rows = [Row(person.name, person.family, "not reached") for person in people if person.takes(cell)]
        return cls(cell, Work(0, 0, 0), rates, rows)

    def time(
        self,
        admitted: Admitted,
        *,
        rounds: int,
        patience: float,
        deadline: float,
        tell: Callable[[str], None],
    ) -> None:
        """Time those who were admitted; see `time_in_turns`. An interruption leaves the samples that are there."""
        samples: dict[str, list[float]] = {}
        faults: dict[str, str] = {}
        try:
            time_in_turns(
                admitted.entries,
                samples,
                rounds=rounds,
                patience=patience,
                deadline=deadline,
                tell=tell,
                faults=faults,
                warm=admitted.warm,
            )
            self.finished = True
        finally:
            for row in self.rows:
                if row.name in faults:
                    row.status, row.reason = "failed", faults[row.name]
                elif samples.get(row.name):
                    row.status, row.samples = "measured", samples[row.name]
                    row.facts |= admitted.entries[row.name].facts()

    @property
    def floor(self) -> float:
        """Seconds below which the machine can't do the work."""
        return self.work.floor(self.rates.bandwidth, self.rates.gemm)

    @property
    def dense(self) -> Row | None:
        """The dense layer that ratios refer to."""
        return self.measured(self.cell.kind.dense)

    def row_of(self, name: str) -> Row:
        """The row of a contender that takes the cell."""
        return next(row for row in self.rows if row.name == name)

    def measured(self, name: str) -> Row | None:
        """The row of a contender, if it was measured."""
        return next((row for row in self.rows if row.name == name and row.measured), None)

    @property
    def ours(self) -> Row | None:
        """What moesaic does by itself here: the kernel that "auto" takes, or the faster of two ways to run a model."""
        chosen = next((row for row in self.rows if row.family == "moesaic" and row.default and row.measured), None)
        return chosen or self.best("moesaic")

    def best(self, family: str) -> Row | None:
        """The fastest of a family."""
        return min(
            (row for row in self.rows if row.family == family and row.measured),
            key=lambda row: row.median,
            default=None,
        )

    def ratio(self, row: Row, other: Row | None) -> float | None:
        """`row` over `other`, medians; above 1 is slower, or more memory."""
        if other is None or not row.measured or other.median == 0:
            return None
        return row.median / other.median

    def weight_bandwidth(self, row: Row) -> float:
        """Bytes of touched weights a second."""
        return self.work.weight_bytes / row.median

    def to_dict(self) -> dict[str, Any]:
        """As plain data, with the ratios beside the samples."""
        rows = []
        for row in self.rows:
            values = asdict(row)
            if row.measured:
                values["median"], values["spread"] = row.median, row.spread
                values["over_dense"] = self.ratio(row, self.dense)
                values["over_transformers"] = self.ratio(row, self.best("transformers"))
                if self.cell.kind.timed:
                    values["over_floor"] = row.median / self.floor
                    values["weight_bytes_per_second"] = self.weight_bandwidth(row)
            rows.append(values)
        return {
            "cell": self.cell.to_dict(),
            "finished": self.finished,
            "unit": "seconds" if self.cell.kind.timed else "bytes",
            "work": asdict(self.work),
            "rates": asdict(self.rates),
            "floor": self.floor,
            "facts": self.facts,
            "rows": rows,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> CellResult:
        """The inverse of `to_dict`."""
        names = Row.__dataclass_fields__
        rows = [Row(**{name: value for name, value in row.items() if name in names}) for row in values["rows"]]
        return cls(
            Cell.from_dict(values["cell"]),
            Work(**values["work"]),
            Rates(**values["rates"]),
            rows,
            values["facts"],
            values["finished"],
        )
