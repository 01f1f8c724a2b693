"""Answers found in texts, and their spelling."""

from __future__ import annotations

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesaic.errors import ConfigError
from moesaic.infer.consistency import (
    after_marker,
    by_function,
    by_pattern,
    by_preset,
    choice_letter,
    last_number,
    normalise_letter,
    normalise_number,
    normalise_text,
)

NUMBERS = st.decimals(allow_nan=False, allow_infinity=False, min_value=-(10**9), max_value=10**9, places=4)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1,234.50", "1234.5"),
        ("+7", "7"),
        ("-0.0", "0"),
        ("\u22123", "-3"),
        ("$1,000", "1000"),
        ("-$5", "-5"),
        ("50%", "50"),
        ("44.", "44"),
        ("007", "7"),
        (".5", "0.5"),
        ("1e3", "1000"),
        ("1.50e-2", "0.015"),
        ("12345678901234567890123456789012345678.10", "12345678901234567890123456789012345678.1"),
        ("1,23", None),
        ("--5", None),
        ("five", None),
        ("", None),
        ("3 4", None),
    ],
)
def test_numbers_have_one_spelling(text: str, number: str | None) -> None:
    assert normalise_number(text) == number


def test_a_huge_exponent_stays_one() -> None:
    assert normalise_number("1e9999") == "1E+9999"


@given(NUMBERS, st.integers(0, 3))
def test_spellings_of_a_number_agree(value: Decimal, zeros: int) -> None:
    plain = normalise_number(str(value) if "E" in str(value) else format(value, "f"))
    grouped = format(value, ",f")
    assert normalise_number(grouped + ("0" * zeros if "." in grouped else "")) == plain
    assert plain is not None
    assert Decimal(plain) == value
    assert normalise_number(plain) == plain
    if value > 0:
        assert normalise_number(f"+{grouped}") == plain


@given(NUMBERS, NUMBERS)
def test_different_numbers_differ(one: Decimal, other: Decimal) -> None:
    same = normalise_number(format(one, "f")) == normalise_number(format(other, "f"))
    assert same == (one == other)


@given(st.text())
def test_text_is_normalised_once_and_for_all(text: str) -> None:
    once = normalise_text(text)
    assert once is None or normalise_text(once) == once
    assert normalise_text(f"  {text}\n") == once


def test_text_and_letters() -> None:
    assert normalise_text("  New\n YORK ") == "new york"
    assert normalise_text(" \t") is None
    assert [normalise_letter(text) for text in ("(b)", "B.", " c ", "ab", "")] == ["B", "B", "C", None, None]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("47-12=35.35+9=44#44", "44"),
        ("so 47-12", "12"),
        ("it is -12", "-12"),
        ("costs $1,234.00.", "1234"),
        ("from 3 to 4%", "4"),
        ("none", None),
    ],
)
def test_last_number(text: str, number: str | None) -> None:
    assert last_number()(text) == number


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("A man walks. The answer is (C) because", "C"),
        ("answer: b", "B"),
        ("either (A) or (D)", "D"),
        ("I think\nB", "B"),
        ("C) blue", "C"),
        ("A man walks", None),
    ],
)
def test_choice_letter(text: str, letter: str | None) -> None:
    assert choice_letter()(text) == letter


def test_after_marker() -> None:
    assert after_marker()("first 3 #### 5\nthen #### 1,000 apples\n7") == "1000"
    assert after_marker("So:", "text")("So: Yes \nno") == "yes"
    assert after_marker()("nothing 4") is None
    assert after_marker()("#### none\n8") is None


def test_patterns() -> None:
    assert by_pattern(r"is (\w+)")("it is Red, no it is  x. it is Blue") == "blue"
    assert by_pattern(r"is (\w+)", which="first")("it is Red, it is Blue") == "red"
    assert by_pattern(r"(so|then) (?P<answer>[\d,]+)", "number")("so 1,000") == "1000"
    assert by_pattern(r"(\w+)", "number")("word") is None
    assert by_pattern(r"end(x)?")("end") is None
    assert by_function(lambda text: text[-1:], "number")("a5") == "5"
    assert by_preset("whole")(" Yes ") == "yes"


@pytest.mark.parametrize(
    ("pattern", "message"),
    [("answer", "has no group"), ("(a)(b)", r"2 groups.*\?P<answer>"), ("(", "not a regular expression")],
)
def test_bad_patterns_are_named(pattern: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        by_pattern(pattern)


def test_other_bad_input_is_named() -> None:
    with pytest.raises(ConfigError, match="marker"):
        after_marker("")
    with pytest.raises(ConfigError, match=r"preset.*choose one of"):
        by_preset("best")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"compare.*choose one of"):
        by_function(str, "close")  # type: ignore[arg-type]
