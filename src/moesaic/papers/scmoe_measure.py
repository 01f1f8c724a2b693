"""What is measured in the SCMoE reproduction: all decodings on held-out problems, and how far the passes are apart."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moesaic.errors import ConfigError
from moesaic.infer.decode.decodings import SelfContrast
from moesaic.infer.decode.overrides import override_routing
from moesaic.infer.tasks import ResultsFile, Task, TaskResult, compare, evaluate_task
from moesaic.infer.tasks.results import digest
from moesaic.papers.experiment import Measurement, Trained
from moesaic.papers.given import Given
from moesaic.papers.scmoe_decodings import CONTRAST, ENSEMBLE, FIXED, GREEDY, Setting, fixed, settings
from moesaic.papers.scmoe_latency import latencies
from moesaic.papers.scmoe_options import MeasureOptions, Routed
from moesaic.papers.scmoe_passes import Answered, Distance, distances
from moesaic.papers.scmoe_splits import Splits, splits_of_run, splits_of_user
from moesaic.train import load_model

PLAIN, CONTRASTED = "plain", "self-contrast"
"""Ways to draw samples for a vote."""


def measure(trained: Trained) -> dict[str, Measurement]:
    """All of it for an arm that was trained here."""
    options = MeasureOptions.from_dict(trained.options, where="measure")
    amateur = options.amateur
    if isinstance(amateur, int):
        if amateur not in trained.checkpoints:
            steps = ", ".join(map(str, sorted(trained.checkpoints)))
            raise ConfigError(
                "measure.amateur",
                amateur,
                f"is no checkpoint of {trained.arm}, which has {steps}",
                "choose one of them",
            )
        amateur = str(trained.checkpoints[amateur])
    tokenizer = trained.data.tokenizer
    splits = splits_of_run(trained.run.data, options)
    second = _second(amateur, trained.model)
    seed = trained.run.train.seed
    return _Measuring(trained.model, tokenizer, options, splits, seed, second, trained.folder).all()


def measure_given(given: Given) -> dict[str, Measurement]:
    """All of it for a model that a user brought."""
    options = MeasureOptions.from_dict(given.options, where="measure")
    if isinstance(options.amateur, int):
        raise ConfigError(
            "measure.amateur", options.amateur, "is a step of a run, and there is none", "give the folder of a model"
        )
    splits = splits_of_user(options, given.seed)
    second = _second(options.amateur, given.model)
    return _Measuring(given.model, given.tokenizer, options, splits, given.seed, second, given.folder).all()


def _second(folder: str | None, model: PreTrainedModel) -> PreTrainedModel | None:
    """The amateur, where and as wide as the model."""
    if folder is None:
        return None
    return load_model(folder, dtype=model.dtype).to(model.device).eval()  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True)
class _Measuring:
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    options: MeasureOptions
    splits: Splits
    seed: int
    amateur: PreTrainedModel | None
    folder: Path | None

    def all(self) -> dict[str, Measurement]:
        """Every measurement by name."""
        routed = Routed.of(self.model)
        grids = settings(routed, self.options, self.amateur)
        found: dict[str, Measurement] = {"trained_picks": routed.picks, "experts": routed.experts}
        greedy = self._evaluate(grids[GREEDY][0], self.splits.test)
        self._methods(found, grids, greedy)
        self._numbers(found, grids[ENSEMBLE], greedy)
        self._distances(found, routed, greedy)
        self._exactness(found, routed)
        self._votes(found, grids[CONTRAST][_place(found.get(f"chosen.{CONTRAST}", 0))])
        found |= latencies(self.model, self.tokenizer, self.splits.dev, routed, self.options, self.amateur)
        return {name: _rounded(value) for name, value in found.items()}

    def _evaluate(self, setting: Setting, task: Task, model: PreTrainedModel | None = None) -> TaskResult:
        with _routing(self.model if model is None else model, setting.override):
            return self._run(setting, task, model=model)

    def _run(
        self, setting: Setting, task: Task, *, samples: int = 1, model: PreTrainedModel | None = None, **sampling: Any
    ) -> TaskResult:
        """Answers with a setting, in the routing that the model has now; those of an earlier call are not made again."""
        identity = {
            "items": {name: item.fingerprint for name, item in task.items.items()},
            "model": "amateur" if model is not None else "",
            "override": setting.override,
            "strategy": None if setting.strategy is None else setting.strategy.to_dict(),
            "sampling": sampling,
            "samples": samples,
            "seed": self.seed,
            "batch_size": self.options.batch_size,
        }
        results = None
        if self.folder is not None:
            results = ResultsFile(self.folder / f"{task.name}-{digest(identity)}.jsonl", identity)
        return evaluate_task(
            self.model if model is None else model,
            self.tokenizer,
            task,
            decoding=setting.generate(**sampling),
            samples=samples,
            batch_size=self.options.batch_size,
            seed=self.seed,
            results=results,
        )

    def _methods(
        self, found: dict[str, Measurement], grids: Mapping[str, Sequence[Setting]], greedy: TaskResult
    ) -> None:
        """Each method with the setting that was best on the development split, the first of equals, on the test split."""
        for method, grid in grids.items():
            best = 0
            if method not in FIXED:
                accuracies = [self._evaluate(setting, self.splits.dev).accuracy.value for setting in grid]
                found[f"dev.{method}"] = [100 * value for value in accuracies]
                best = max(range(len(grid)), key=accuracies.__getitem__)
                found[f"chosen.{method}"] = best
            result = greedy if method == GREEDY else self._evaluate(grid[best], self.splits.test)
            found[f"accuracy.{method}"] = 100 * result.accuracy.value
            for kind in self.splits.names:
                right = [row["correct"] for row in result.rows if self.splits.kinds[row["id"]] == kind]
                if right:
                    found[f"accuracy.{method}.{kind}"] = 100 * sum(right) / len(right)
            if method != GREEDY:
                paired = compare(result.correct, greedy.correct)
                found[f"gained.{method}"], found[f"lost.{method}"] = paired.gained, paired.lost
                found[f"p_value.{method}"] = paired.p_value
        found["test_items"], found["dev_items"] = greedy.accuracy.items, len(self.splits.dev.items)

    def _numbers(self, found: dict[str, Measurement], grid: Sequence[Setting], greedy: TaskResult) -> None:
        """Accuracy with every number of experts on the test split: no choice is made here."""
        numbers = [int(setting.override.removeprefix("k=")) for setting in grid]
        accuracies = []
        for number, setting in zip(numbers, grid, strict=True):
            result = greedy if number == found["trained_picks"] else self._evaluate(setting, self.splits.test)
            accuracies.append(100 * result.accuracy.value)
            found[f"experts.{number}"] = accuracies[-1]
        found["numbers"], found["numbers.accuracy"] = numbers, accuracies

    def _distances(self, found: dict[str, Measurement], routed: Routed, greedy: TaskResult) -> None:
        """KL divergence and unchosen experts of weak passes along the strong pass's own answers."""
        if self.amateur is not None:
            result = self._evaluate(Setting(""), self.splits.test, self.amateur)
            found["amateur"] = 100 * result.accuracy.value
        weak = tuple(dict.fromkeys((*routed.ranks(self.options), *routed.weak(self.options))))
        measured = distances(
            self.model,
            self.tokenizer,
            self._answered(greedy),
            weak,
            batch_size=self.options.batch_size,
            amateur=self.amateur,
        )
        for name, distance in measured.items():
            found |= _of_distance(name, distance)
        ranked = [name for name in measured if name.startswith("rank=")]
        found["kl"] = [measured[name].mean_kl for name in ranked]
        found["unchosen"] = [100 * measured[name].unchosen for name in ranked]

    def _answered(self, greedy: TaskResult) -> list[Answered]:
        """Prompts and greedy answers, with the end of the text where it was reached, as token ids."""
        found = []
        for row in greedy.rows[: self.options.compared]:
            item = self.splits.test.items[row["id"]]
            [sample] = row["samples"]
            prompt = self.tokenizer(item.prompt)["input_ids"]
            answer = self.tokenizer(sample["text"], add_special_tokens=False)["input_ids"]
            ended = [self.tokenizer.eos_token_id] if sample["ended"] == "eos" else []
            if answer or ended:
                found.append(Answered(list(prompt), [*answer, *ended]))  # pyright: ignore[reportArgumentType, reportGeneralTypeIssues]
        return found

    def _exactness(self, found: dict[str, Measurement], routed: Routed) -> None:
        """Shares of development texts that are equal where the method says they are."""
        greedy = self._evaluate(Setting(""), self.splits.dev)
        weak, beta = fixed(routed, self.options)

        def contrast(**values: Any) -> TaskResult:
            strategy = SelfContrast(**{"weak": weak, "alpha": self.options.alpha, "beta": beta, **values})
            return self._evaluate(Setting("", strategy=strategy), self.splits.dev)

        two_rows = contrast()
        found["same.beta_0"] = _same(contrast(beta=0.0), greedy)
        found["same.weak_is_strong"] = _same(contrast(weak=f"k={routed.picks}"), greedy)
        found["same.alpha_1"] = _same(contrast(alpha=1.0), greedy)
        found["same.plans"] = _same(contrast(plan="two_passes"), two_rows)
        found["same.contrast"] = _same(two_rows, greedy)

    def _votes(self, found: dict[str, Measurement], chosen: Setting) -> None:
        """Majority votes over samples that are drawn plainly and with self-contrast; more samples add to fewer."""
        items = dict(list(self.splits.test.items.items())[: self.options.voted])
        task, off = Task("test", items), {"top_k": 0, "top_p": 1.0}
        ways = {PLAIN: (Setting(""), self.options.temperature), CONTRASTED: (chosen, 1.0)}
        for way, (setting, temperature) in ways.items():
            for votes in self.options.votes:
                result = self._run(setting, task, samples=votes, do_sample=True, temperature=temperature, **off)
                found[f"majority.{way}.{votes}"] = 100 * result.accuracy.value
        found["voted_items"] = len(items)


@contextlib.contextmanager
def _routing(model: PreTrainedModel, override: str) -> Iterator[None]:
    if not override:
        yield
        return
    with override_routing(model, override):
        yield


def _of_distance(name: str, distance: Distance) -> dict[str, Measurement]:
    found: dict[str, Measurement] = {
        f"kl.{name}": distance.mean_kl,
        f"kl_expression.{name}": distance.mean_kl_expression,
        f"kl_other.{name}": distance.mean_kl_other,
    }
    if distance.picks:
        found[f"unchosen.{name}"] = 100 * distance.unchosen
        for layer, picks in distance.picks.items():
            found[f"unchosen.{name}.L{layer}"] = 100 * distance.unchosen_by_layer[layer] / picks
    return {key: value for key, value in found.items() if not (isinstance(value, float) and math.isnan(value))}


def _rounded(value: Measurement) -> Measurement:
    if isinstance(value, int):
        return value
    return round(value, 6) if isinstance(value, float) else [round(number, 6) for number in value]


def _place(value: Measurement) -> int:
    assert isinstance(value, int)
    return value


def _same(one: TaskResult, other: TaskResult) -> float:
    """Share of items, in percent, whose texts are equal."""
    texts = [[row["samples"][0]["text"] for row in result.rows] for result in (one, other)]
    return 100 * sum(first == second for first, second in zip(*texts, strict=True)) / len(texts[0])
