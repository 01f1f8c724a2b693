"""Problems with worked solutions, made by templates from a seed: sums step by step, and short reasoning texts.

A problem's side of the split depends on what has to be computed, so that no held-out problem is a training one with other
names: the sum `47-12+9` is on one side, whether it is asked in digits or in words.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moesaic.data.documents import Document
from moesaic.data.split import is_validation
from moesaic.errors import DataError

if TYPE_CHECKING:
    from moesaic.data.config import ProblemDomain, ProblemsSource

ANSWER_PATTERN = r"#(-?\w+)"
"""What finds the answer in the text of a solution."""

PROBLEMS_VERSION = 1
"""Part of the cache key: raise it when a seed no longer gives the same problems."""

_NAMES = ("Ann", "Bob", "Cid", "Dan", "Eve", "Fay", "Gus", "Hal", "Ida", "Jim", "Kim", "Leo")
_THINGS = ("nuts", "pens", "eggs", "figs", "keys", "cups", "hats", "maps")
_RELATIONS = ("older", "taller", "faster", "richer")
_MORE, _FEWER = ("finds {n}", "buys {n}", "gets {n}"), ("loses {n}", "gives {n} away", "sells {n}")
_LARGEST = 99
# After so many problems that were not held out in a row, there are hardly any new ones.
_PATIENCE = 20_000


@dataclass(frozen=True)
class Problem:
    """One problem.

    Attributes:
        domain: its kind.
        question: the prompt, up to where the solution begins.
        steps: the worked solution.
        answer: a number, a name, or yes or no.
        key: what has to be worked out, the same for all wordings of it.
    """

    domain: ProblemDomain
    question: str
    steps: str
    answer: str
    key: str

    @property
    def solution(self) -> str:
        """What follows the question: the steps, `#` and the answer."""
        return f"{self.steps}#{self.answer}"

    @property
    def text(self) -> str:
        """The whole of it."""
        return self.question + self.solution


def generate(source: ProblemsSource, domain: ProblemDomain) -> Iterator[Problem]:
    """Problems of a domain without end, the same ones on every machine; they may repeat."""
    chance = random.Random(f"{source.seed}:{domain}")  # a text as seed is hashed by SHA-512, in every process alike
    make = _MAKERS[domain]
    while True:
        yield make(chance, chance.choice(source.steps))


def read_problems(source: ProblemsSource, domain: ProblemDomain) -> Iterator[Document]:
    """The first `source.count` problems of a domain as documents."""
    for number, problem in zip(range(source.count), generate(source, domain), strict=False):
        yield Document(problem.text, domain, f"{domain}:{number}", split_by=problem.key)


def is_held_out(problem: Problem, validation_fraction: float) -> bool:
    """Whether runs with this `validation_fraction` hold the problem out."""
    return is_validation(Document(problem.text, problem.domain, "", split_by=problem.key), validation_fraction)


def held_out_problems(
    source: ProblemsSource, validation_fraction: float, count: int, *, domains: Sequence[ProblemDomain] | None = None
) -> list[Problem]:
    """Different problems that a run with this source never trains on, equally many of each domain.

    They go on beyond those that the run holds out for its validation loss, which are the first of them.

    Args:
        source: of the run.
        validation_fraction: of the run's `data` section, which decides what is held out.
        count: how many in all; the first domains have one more where it does not divide.
        domains: of which domains; None for all of the source.

    Raises:
        DataError: if there are not as many, because the steps leave too few different problems.
    """
    domains = source.domains if domains is None else domains
    found: list[list[Problem]] = []
    for place, domain in enumerate(domains):
        wanted = count // len(domains) + (place < count % len(domains))
        own: dict[str, Problem] = {}
        missed = 0
        problems = generate(source, domain)
        while len(own) < wanted:
            problem = next(problems)
            if problem.key in own or not is_held_out(problem, validation_fraction):
                missed += 1
                if missed > _PATIENCE:
                    raise DataError(
                        f"domain {domain!r} of the problems has hardly more than {len(own)} different held-out ones with "
                        f"steps {list(source.steps)}; ask for fewer, or give more steps or a larger validation_fraction"
                    )
                continue
            missed = 0
            own[problem.key] = problem
        found.append(list(own.values()))
    # By turns, so that any first part of the list has all domains.
    longest = max(map(len, found), default=0)
    return [own[place] for place in range(longest) for own in found if place < len(own)]


def _sum(chance: random.Random, steps: int) -> tuple[list[int], list[str]]:
    """Numbers of a sum that never falls below 0, and its worked steps: [47, -12, 9], ["47-12=35", "35+9=44"]."""
    value = chance.randint(10, _LARGEST)
    numbers, lines = [value], []
    for _ in range(steps):
        change = chance.randint(1, _LARGEST)
        if chance.random() < 0.5:
            change = -chance.randint(1, min(_LARGEST, value)) if value else change
        lines.append(f"{value}{change:+d}={value + change}")
        value += change
        numbers.append(change)
    return numbers, lines


def _expression(numbers: Sequence[int]) -> str:
    return str(numbers[0]) + "".join(f"{number:+d}" for number in numbers[1:])


def _sums(chance: random.Random, steps: int) -> Problem:
    numbers, lines = _sum(chance, steps)
    key = _expression(numbers)
    return Problem("sums", f"Q{key}=?A", ".".join(lines), str(sum(numbers)), key)


def _stories(chance: random.Random, steps: int) -> Problem:
    numbers, lines = _sum(chance, steps)
    name, thing = chance.choice(_NAMES), chance.choice(_THINGS)
    told = [chance.choice(_MORE if number > 0 else _FEWER).format(n=abs(number)) for number in numbers[1:]]
    question = f"Q{name} has {numbers[0]} {thing}, {', '.join(told)}. How many?A"
    worked = [f"{line} {thing}" for line in lines]
    return Problem("stories", question, ". ".join(worked), str(sum(numbers)), _expression(numbers))


def _comparisons(chance: random.Random, steps: int) -> Problem:
    del steps  # one for each of the two
    names, thing = chance.sample(_NAMES, 2), chance.choice(_THINGS)
    while True:
        sums = [_sum(chance, 1) for _ in names]
        totals = [sum(numbers) for numbers, _ in sums]
        if totals[0] != totals[1]:
            break
    first, second = (_expression(numbers) for numbers, _ in sums)
    question = f"Q{names[0]} has {first} {thing}, {names[1]} {second}. Who has more?A"
    worked = "".join(f"{name} {lines[0]}. " for name, (_, lines) in zip(names, sums, strict=True))
    sign = ">" if totals[0] > totals[1] else "<"
    answer = names[0] if totals[0] > totals[1] else names[1]
    # Which of the two stands first is wording; equal pairs of sums are one problem.
    return Problem(
        "comparisons", question, f"{worked}{totals[0]}{sign}{totals[1]}", answer, "|".join(sorted((first, second)))
    )


def _orders(chance: random.Random, steps: int) -> Problem:
    names, relation = chance.sample(_NAMES, steps + 2), chance.choice(_RELATIONS)
    facts = [f"{above} is {relation} than {below}" for above, below in itertools.pairwise(names)]
    chance.shuffle(facts)
    places = chance.sample(range(len(names)), 2)
    asked = [names[place] for place in places]
    answer = "yes" if places[0] < places[1] else "no"
    question = f"Q{'. '.join(facts)}. Is {asked[0]} {relation} than {asked[1]}?A"
    compared = ">".join(names[place] for place in sorted(places))
    # The chain and what is asked of it, either way round; the order of the facts and the relation are wording.
    return Problem("orders", question, f"{'>'.join(names)}. {compared}", answer, f"{'>'.join(names)}:{compared}")


_MAKERS: dict[ProblemDomain, Callable[[random.Random, int], Problem]] = {
    "sums": _sums,
    "stories": _stories,
    "comparisons": _comparisons,
    "orders": _orders,
}
