import itertools
import re
from pathlib import Path

import pytest

from moesaic.data import DataConfig, Problem, ProblemsSource, TrainBPE, held_out_problems, prepare_data, read_documents
from moesaic.data.problems import ANSWER_PATTERN, generate
from moesaic.data.split import is_validation
from moesaic.errors import ConfigError, DataError

SOURCE = ProblemsSource(count=60)
DOMAINS = SOURCE.domains


def some(domain: str, count: int = 300, steps: tuple[int, ...] = (2,)) -> list[Problem]:
    assert domain in DOMAINS
    return list(itertools.islice(generate(ProblemsSource(steps=steps), domain), count))


def worked(steps: str) -> list[tuple[str, int]]:
    """Left and right side of each sum in a solution."""
    return [(left, int(right)) for left, right in re.findall(r"(\d+[+-]\d+)=(-?\d+)", steps)]


@pytest.mark.parametrize("domain", DOMAINS)
def test_answers_stand_at_the_end_of_the_text(domain: str):
    for problem in some(domain):
        assert problem.text == problem.question + problem.solution
        assert re.findall(ANSWER_PATTERN, problem.text) == [problem.answer]


@pytest.mark.parametrize("domain", ["sums", "stories", "comparisons"])
def test_every_step_is_right(domain: str):
    for problem in some(domain):
        sums = worked(problem.steps)
        assert len(sums) == 2
        for left, right in sums:
            assert eval(left) == right >= 0  # digits and a sign, by the pattern
        if domain != "comparisons":
            assert int(problem.answer) == sums[-1][1] == eval(problem.key)
            assert sums[1][0].startswith(str(sums[0][1]))


def test_stories_add_what_is_found_and_take_what_is_lost():
    for problem in some("stories"):
        told = re.findall(r"(finds|buys|gets|loses|gives|sells) (\d+)", problem.question)
        changes = [int(number) if verb in ("finds", "buys", "gets") else -int(number) for verb, number in told]
        [begun] = re.findall(r" has (\d+) ", problem.question)
        assert int(begun) + sum(changes) == int(problem.answer)


def test_who_has_more_has_more():
    for problem in some("comparisons"):
        [(first, one, second, other)] = re.findall(
            r"Q(\w+) has (\d+[+-]\d+) \w+, (\w+) (\d+[+-]\d+)\.", problem.question
        )
        assert problem.answer == (first if eval(one) > eval(other) else second)
        assert eval(one) != eval(other)


@pytest.mark.parametrize("steps", [1, 3])
def test_orders_follow_from_the_facts(steps: int):
    for problem in some("orders", steps=(steps,)):
        above = dict(re.findall(r"(\w{3}) is \w+ than (\w+)\.", problem.question.replace("Q", "")))
        assert len(above) == steps + 1
        [(first, second)] = re.findall(r"Is (\w+) \w+ than (\w+)\?", problem.question)
        below = first
        while below in above and below != second:
            below = above[below]
        assert problem.answer == ("yes" if below == second else "no")
    answers = [problem.answer for problem in some("orders")]
    assert 0.4 < answers.count("yes") / len(answers) < 0.6


def test_the_same_everywhere_and_others_with_another_seed():
    assert some("sums", 1)[0].text == "Q13+36-16=?A13+36=49.49-16=33#33"
    assert some("sums", 9) == some("sums", 9)
    other = next(generate(ProblemsSource(seed=1), "sums"))
    assert other != some("sums", 1)[0]


def test_held_out_problems_are_of_no_training_problem_in_any_wording():
    config = DataConfig(sources=(ProblemsSource(count=2000),), validation_fraction=0.2)
    training = [document for document in read_documents(config.sources) if not is_validation(document, 0.2)]
    held_out = held_out_problems(ProblemsSource(count=2000), 0.2, 402)
    keys = {problem.key for problem in held_out}
    assert len(keys) >= 400  # a sum may be asked in digits and in words
    assert not keys & {document.split_by for document in training}
    assert not {problem.question for problem in held_out} & {
        document.text.partition("?A")[0] + "?A" for document in training
    }
    assert [problem.domain for problem in held_out[:5]] == [*DOMAINS, DOMAINS[0]]
    assert len(held_out) == 402
    assert held_out[:40] == held_out_problems(ProblemsSource(), 0.2, 40)


def test_a_sum_is_on_one_side_in_digits_and_in_words():
    by_key: dict[str, set[bool]] = {}
    for domain in ("sums", "stories"):
        for document in read_documents([ProblemsSource(domains=(domain,), count=5000, steps=(1,))]):
            assert document.split_by is not None
            by_key.setdefault(document.split_by, set()).add(is_validation(document, 0.3))
    assert len(by_key) < 10_000  # some are in both, or twice
    assert all(len(sides) == 1 for sides in by_key.values())


def test_prepared_like_any_other_text(tmp_path: Path):
    config = DataConfig(
        sources=(SOURCE,), tokenizer=TrainBPE(vocab_size=258), sequence_length=64, validation_fraction=0.2
    )
    data = prepare_data(config, tmp_path, progress=False)
    assert data.summary.domains == DOMAINS
    for domain in DOMAINS:
        assert data.summary.train[domain].documents + data.summary.validation[domain].documents == 60
    ids = data.train.batch([0])["input_ids"][0].tolist()
    assert len(data.tokenizer) == 258  # a token a character
    assert str(data.tokenizer.decode(ids)).startswith("Q13+36-16=?A13+36=49.49-16=33#33")


def test_too_few_different_problems_are_an_error():
    with pytest.raises(DataError, match=r"domain 'orders' .* hardly more than \d+ different held-out ones .*\[1\]"):
        held_out_problems(ProblemsSource(steps=(1,)), 0.01, 5000, domains=("orders",))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": []}, "steps"),
        ({"steps": [0]}, r"steps\.0 = 0"),
        ({"steps": [11]}, r"steps\.0 = 11"),
        ({"domains": ["riddles"]}, r"domains\.0 = 'riddles' is not one of the choices.*stories"),
        ({"count": 0}, "count = 0"),
    ],
)
def test_bad_values_are_named(values: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        ProblemsSource.from_dict(values)
