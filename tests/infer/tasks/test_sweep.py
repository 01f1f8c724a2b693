"""Sweeps: every decoding on the same items as alone, gone on with, costs of a token, choice on other items, pictures."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
from tests.infer.consistency.text_models import character_tokenizer, text_model

from moesaic.errors import ConfigError, DataError
from moesaic.infer.consistency import Generate, Sampler, SpecDecoding
from moesaic.infer.consistency.sample import Usage
from moesaic.infer.decode import DecodingSpec
from moesaic.infer.tasks import (
    ChoiceItem,
    Cost,
    CostSettings,
    GenerateItem,
    Sweep,
    SweepPoint,
    Task,
    TaskResult,
    accuracy,
    choose,
    compare,
    draw_sweep,
    evaluate_task,
    measure_costs,
    read_results,
    sweep,
)
from moesaic.infer.tasks.pictures import grids_of

TOKENIZER = character_tokenizer()
GRID = ["greedy", "greedy override=k={1,3}", "self-contrast weak=rank={1,2} beta={0.1,2}"]
COUNTED = CostSettings(prompts=1, tokens=4, timed=False)


def echoes(model: Any, first: int = 0, count: int = 6) -> Task:
    """Items whose answer is what greedy decoding says, but for every third one."""
    sampler = Sampler(model, TOKENIZER, Generate(), max_new_tokens=4)
    drawn = sampler.draw([(f"{number}+{number}=", 0) for number in range(first, first + 3 * count)])
    samples = [sample for sample in drawn if sample.text and not re.search(r"\s", sample.text)][:count]
    items = [
        GenerateItem.from_dict(
            {
                "prompt": sample.prompt,
                "answer": "no" if number % 3 == 2 else sample.text,
                "preset": "whole",
                "compare": "exact",
                "max_new_tokens": 4,
            }
        )
        for number, sample in enumerate(samples)
    ]
    return Task("echoes", {str(number): item for number, item in enumerate(items)})


@pytest.mark.parametrize("name", ["own", "mixtral"])
def test_every_decoding_does_as_it_does_alone(name: str) -> None:
    model = text_model(name)
    task = echoes(model)
    found = sweep(model, TOKENIZER, task, GRID, cost=COUNTED)
    assert [point.label for point in found.points] == [spec.label for spec in DecodingSpec.grid_of(GRID)]
    first = found.points[0]
    assert (first.accuracy.correct, first.compared) == (4, None)
    for point in found.points[1:]:
        alone = evaluate_task(model, TOKENIZER, task, decoding=SpecDecoding(point.decoding))
        assert point.tasks["echoes"].correct == alone.correct
        assert point.compared == compare(alone.correct, first.tasks["echoes"].correct)
        assert point.compared is not None
        assert point.compared.gained == 0  # what greedy gets wrong has no right answer
    assert found.best in found.front()
    one, three, *contrasts = [point.cost for point in found.points[1:]]
    assert one is not None
    assert three is not None
    assert (one.positions, one.passes, one.experts_per_layer, three.experts_per_layer) == (1, 1, 1, 3)
    assert one.bytes_ratio < 1 < three.bytes_ratio
    for cost in contrasts:
        assert cost is not None
        assert (cost.positions, cost.passes, cost.time_ratio) == (2, 1, None)
    assert contrasts[0] is not None
    assert contrasts[0].bytes_ratio == 1  # rank 1 is among the top two


def test_a_sweep_that_was_cut_short_goes_on(tmp_path: Path) -> None:
    model = text_model("own")
    task, options = echoes(model), {"folder": tmp_path, "batch_size": 1, "cost": None}
    steps: list[tuple[str, int, int]] = []

    def stop(what: str, done: int, total: int) -> None:
        steps.append((what, done, total))
        if what != "greedy" and done > 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep(model, TOKENIZER, task, ["greedy", "self-contrast"], progress=stop, **options)
    assert steps[-1] == ("self-contrast", 10, 12)
    steps.clear()
    again = sweep(
        model, TOKENIZER, task, ["greedy", "self-contrast"], progress=lambda *step: steps.append(step), **options
    )
    assert steps == [("greedy", 6, 12), ("self-contrast", 10, 12), ("self-contrast", 12, 12)]
    for point, path in zip(again.points, sorted(tmp_path.glob("results/*.jsonl")), strict=True):
        assert path.name.startswith(point.label)
        assert {row["id"]: row["correct"] for row in read_results(path)} == point.tasks["echoes"].correct
    with pytest.raises(DataError, match="another model or other settings"):
        sweep(model, TOKENIZER, task, ["greedy"], run={"model": "another"}, **options)


def test_samples_are_of_decodings_that_sample() -> None:
    model = text_model("llama")
    found = sweep(model, TOKENIZER, echoes(model), ["greedy", "sample temperature=0.5"], samples=3, cost=None)
    drawn = [[len(row["samples"]) for row in point.tasks["echoes"].rows] for point in found.points]
    assert set(drawn[0]) == {1}
    assert max(drawn[1]) > 1


def test_costs_beside_each_other() -> None:
    model = text_model("mixtral")
    model.generation_config.eos_token_id = list(range(3, 64))  # it would end at once
    specs = DecodingSpec.grid_of(["greedy", "self-contrast plan={two_rows,two_passes}", "beam num_beams=3"])
    done: list[int] = []
    settings = CostSettings(prompts=2, tokens=5, repeats=2)
    costs = measure_costs(model, TOKENIZER, ["1+", "2+2", "3+3+3"], specs, settings, progress=done.append)
    assert sum(done) == 2 * 4 * 3
    assert [cost.positions for cost in costs] == [1, 2, 2, 3]
    assert [cost.passes for cost in costs] == [1, 1, 2, 1]
    greedy, two_rows, two_passes, beams = costs
    assert (greedy.time_ratio, greedy.bytes_ratio) == (1, 1)
    assert 1 < two_rows.bytes_ratio < two_passes.bytes_ratio
    assert beams.experts_per_layer > greedy.experts_per_layer == 2
    for cost in costs:
        assert 0 < (cost.seconds or 0) < 5
        assert 0 < (cost.time_low or 0) <= (cost.time_ratio or 0) <= (cost.time_high or 0)


def test_a_decoding_is_chosen_on_other_items(tmp_path: Path) -> None:
    model = text_model("own")
    validation, test = echoes(model), echoes(model, first=10, count=4)
    # The second decoding is as good and cheaper, so it is chosen.
    decodings = ["self-contrast weak=rank=3 beta=0", "greedy", "greedy override=k=1"]
    found = choose(model, TOKENIZER, validation, test, decodings, folder=tmp_path, cost=COUNTED)
    assert found.chosen.label == "greedy"
    assert [point.label for point in found.test.points] == ["self-contrast weak=rank=3 beta=0", "greedy"]
    assert found.chosen.accuracy.items == 4
    assert found.chosen.cost == found.validation.points[1].cost
    assert found.chosen.compared is not None
    assert len(list(tmp_path.glob("test/results/*"))) == 2
    assert found.overlap == 0
    assert choose(model, TOKENIZER, test, test, ["greedy"], cost=None, limit=3).overlap == 3


def made(text: str, correct: int, cost: float, first: SweepPoint | None = None, items: int = 40) -> SweepPoint:
    """A point of a sweep that has this many right."""
    rows: Any = tuple({"id": str(number), "correct": number < correct} for number in range(items))
    result = TaskResult("made", accuracy(correct, items), rows, 0, Usage())
    compared = None if first is None else compare(result.correct, first.tasks["made"].correct)
    times = {"seconds": cost / 100, "time_ratio": cost, "time_low": cost, "time_high": cost}
    return SweepPoint(
        DecodingSpec.of(text), {"made": result}, compared, Cost(2, 1, 1e6 * cost, 2, 2 - cost / 2, **times)
    )


def made_sweep() -> Sweep:
    first = made("greedy", 20, 1.0)
    points = [first, *(made(f"greedy override=k={k}", 10 + 3 * k, 0.8 + k / 10, first) for k in (1, 2, 3))]
    for rank, beta in itertools.product((1, 2), (0.1, 0.3, 0.5)):
        points.append(made(f"self-contrast weak=rank={rank} beta={beta}", round(25 - 10 * beta * rank), 1.3, first))
    return Sweep((*points, made("beam", 25, 2.0, first), made("sample temperature=0.7", 15, 1.0, first)))


def test_the_front_and_the_best() -> None:
    found = made_sweep()
    assert [point.label for point in found.front()] == [
        "greedy override=k=1",
        "greedy",
        "self-contrast weak=rank=1 beta=0.1",
        "beam num_beams=4",
    ]
    assert found.best.label == "beam num_beams=4"
    assert [point.cost_on("bytes") for point in found.by_cost("bytes")] == sorted(2 - c / 2 for c in costs_of(found))
    assert found.to_dict()["best"] == "beam num_beams=4"
    with pytest.raises(ConfigError, match=r"cost = 'seconds' was not measured"):
        Sweep((SweepPoint(found.best.decoding, found.best.tasks, None, None),)).by_cost("seconds")


def costs_of(found: Sweep) -> list[float]:
    return [point.cost_on("seconds") for point in found.points]


def test_grids_are_found() -> None:
    found = made_sweep()
    grids, alone = grids_of(found.points[1:])
    ks, contrast = grids
    assert (ks.name, ks.along, ks.across, list(ks.lines[0].points)) == ("greedy", "k", (), [1, 2, 3])
    assert not ks.is_plane
    assert (contrast.name, contrast.along, contrast.across) == ("self-contrast", "beta", ("rank",))
    assert [line.values for line in contrast.lines] == [(1,), (2,)]
    assert contrast.lines[1].points[0.3].label == "self-contrast"  # its defaults
    assert contrast.is_plane
    assert contrast.label(contrast.lines[1]) == "self-contrast, rank 2"
    assert [point.label for point in alone] == ["beam num_beams=4", "sample temperature=0.7"]


def test_pictures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found = made_sweep()
    once = draw_sweep(found, tmp_path / "a.svg")
    assert [path.name for path in once] == ["a.svg", "a-grid.svg"]
    scatter, grid = (path.read_text(encoding="utf-8") for path in once)
    for words in ("Pareto front", "self-contrast, rank 2: beta 0.1, 0.3, 0.5", "greedy: k 1, 2, 3", "beam num_beams=4"):
        assert words in scatter
    assert "62.5 %" in grid or "60.0 %" in grid
    assert draw_sweep(found, tmp_path / "b.svg", axis="seconds")[0].read_bytes() == once[0].read_bytes()
    (page,) = draw_sweep(found, tmp_path / "page.html", axis="bytes")
    text = page.read_text(encoding="utf-8")
    assert text.count("<svg") == 2
    assert text.count("<tr") == 1 + len(found.points)
    assert "weights read for a new token" in text
    with pytest.raises(ConfigError, match="has no known ending"):
        draw_sweep(found, tmp_path / "picture.gif")


def test_bad_input_is_named() -> None:
    model = text_model("own")
    for arguments, message in [
        ((echoes(model), []), "decodings = .* is empty"),
        (([], "greedy"), "tasks = .* is empty"),
    ]:
        with pytest.raises(ConfigError, match=message):
            sweep(model, TOKENIZER, *arguments)
    with pytest.raises(ConfigError, match="tokens = 1 is below 2"):
        CostSettings(tokens=1)
    long = Task("long", {"0": ChoiceItem.from_dict({"prompt": "a" * 255, "choices": ["b", "c"], "answer": 0})})
    with pytest.raises(ConfigError, match="leaves no room for new ones in 256 positions"):
        sweep(model, TOKENIZER, long, "greedy", cost=COUNTED)
