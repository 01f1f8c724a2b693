"""What the SCMoE reproduction asks: a split to choose settings on, and one to report."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moesaic.data import DataConfig, Problem, ProblemsSource, held_out_problems
from moesaic.data.problems import ANSWER_PATTERN, generate, is_held_out
from moesaic.errors import ConfigError
from moesaic.infer.tasks import GenerateItem, Task, load_task
from moesaic.infer.tasks.schema import Item
from moesaic.papers.scmoe_options import MeasureOptions


@dataclass(frozen=True)
class Splits:
    """Items with an answer to generate.

    Attributes:
        dev: settings are chosen on these.
        test: what is reported is measured on these.
        kinds: of each item of both by its id, in order: the domain of a problem, or the name of its file.
    """

    dev: Task
    test: Task
    kinds: Mapping[str, str]

    @property
    def names(self) -> list[str]:
        """The kinds that there are."""
        return list(dict.fromkeys(self.kinds.values()))


def splits_of_run(data: DataConfig, options: MeasureOptions) -> Splits:
    """Held-out problems of a run, its domains by turns.

    Raises:
        ConfigError: if the run has no source of problems.
        DataError: if it has not as many held-out ones.
    """
    sources = [source for source in data.sources if isinstance(source, ProblemsSource)]
    if not sources:
        raise ConfigError("data.sources", "none", "makes problems, which are asked", "add {type: problems}")
    return _of_problems(sources, data.validation_fraction, options)


def splits_of_user(options: MeasureOptions, seed: int) -> Splits:
    """Items of a user's files, or without any our problems behind worked ones.

    Raises:
        DataError: if a file is missing or malformed.
        ConfigError: if an item is multiple choice, or nothing is left for the test split.
    """
    if not options.tasks:
        return _of_problems([ProblemsSource()], DataConfig().validation_fraction, options)
    items: dict[str, Item] = {}
    kinds: dict[str, str] = {}
    for path in options.tasks:
        task = load_task(path)
        for name, item in task.items.items():
            if not isinstance(item, GenerateItem):
                raise ConfigError(
                    "measure.tasks",
                    path,
                    f"has multiple choice (item {name!r})",
                    "give items whose answers are generated",
                )
            items[f"{task.name}:{name}"] = item
            kinds[f"{task.name}:{name}"] = task.name
    order = list(items)
    random.Random(seed).shuffle(order)
    if len(order) <= options.dev:
        raise ConfigError(
            "measure.dev",
            options.dev,
            f"leaves nothing of {len(order)} items to test on",
            "choose fewer, or more tasks",
        )
    return _split(order, items, kinds, options)


def _of_problems(sources: Sequence[ProblemsSource], fraction: float, options: MeasureOptions) -> Splits:
    count = options.dev + options.problems
    domains = sum(len(source.domains) for source in sources)
    by_domain: list[list[Problem]] = []
    for source in sources:
        each = -(-count // domains)
        by_domain += [held_out_problems(source, fraction, each, domains=(domain,)) for domain in source.domains]
    turns = [problem for turn in zip(*by_domain, strict=True) for problem in turn][:count]
    front = _demonstrations(sources, fraction, options.demonstrations)
    items: dict[str, Item] = {
        str(number): GenerateItem(
            prompt=front + problem.question,
            answer=problem.answer,
            pattern=ANSWER_PATTERN,
            max_new_tokens=options.max_new_tokens,
            stop=("\n",) if front else (),
        )
        for number, problem in enumerate(turns)
    }
    return _split(list(items), items, {str(number): problem.domain for number, problem in enumerate(turns)}, options)


def _demonstrations(sources: Sequence[ProblemsSource], fraction: float, count: int) -> str:
    """Worked problems of the training side, a line each, the domains by turns."""
    streams = [
        (problem for problem in generate(source, domain) if not is_held_out(problem, fraction))
        for source in sources
        for domain in source.domains
    ]
    chosen = itertools.islice((next(stream) for stream in itertools.cycle(streams)), count)
    return "".join(f"{problem.text}\n" for problem in chosen)


def _split(
    order: Sequence[str], items: Mapping[str, Item], kinds: Mapping[str, str], options: MeasureOptions
) -> Splits:
    dev, test = order[: options.dev], order[options.dev : options.dev + options.problems]
    return Splits(
        Task("dev", {name: items[name] for name in dev}),
        Task("test", {name: items[name] for name in test}),
        {name: kinds[name] for name in (*dev, *test)},
    )
