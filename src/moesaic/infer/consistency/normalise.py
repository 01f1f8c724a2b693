"""One spelling for equal answers, so that votes and gold answers can be compared as strings."""

from __future__ import annotations

import re
import unicodedata
from decimal import Decimal

# A sign counts only where nothing stands before it that it could subtract from: "47-12" holds 47 and 12.
NUMBER = r"(?:(?<![\w)\]])[-+\u2212])?[$€£]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:[eE][-+]?\d{1,4}\b)?|(?:(?<![\w)\]])[-+\u2212])?\.\d+"
_WHOLE = re.compile(
    r"(?P<sign>[-+\u2212]?)\s*[$€£]?\s*(?P<sign2>[-+\u2212]?)"
    r"(?P<digits>\d{1,3}(?:[,_\u00a0\u202f\u2009]\d{3})+|\d+|(?=\.\d))(?P<rest>(?:\.\d*)?(?:[eE][-+]?\d{1,4})?)\s*[%€£$]?\.?"
)
# Beyond this many places a number is written with an exponent.
_PLACES = 40


def normalise_number(text: str) -> str | None:
    """The shortest decimal spelling of a number: no sign of plus, thousands separators, currency, percent or trailing zeros.

    Exact (`decimal`, not floating point): "1,234.50" and "+1234.5" give "1234.5", "-0.0" gives "0".

    Returns:
        None if `text` is not one number.
    """
    found = _WHOLE.fullmatch(text.strip())
    if found is None or (found["sign"] and found["sign2"]):
        return None
    digits = re.sub(r"\D", "", found["digits"])
    value = Decimal((digits or "0") + found["rest"])
    negative = (found["sign"] or found["sign2"]) in ("-", "\u2212")
    if not value:
        return "0"
    _, places, exponent = value.as_tuple()
    assert isinstance(exponent, int), "the pattern admits no NaN or infinity"
    shorter = list(places)
    while shorter[-1] == 0:
        shorter.pop()
        exponent += 1
    value = Decimal((int(negative), tuple(shorter), exponent))
    return format(value, "f") if abs(value.adjusted()) <= _PLACES else str(value)


def normalise_text(text: str) -> str | None:
    """`text` without differences of case, white space and Unicode spelling (NFKC); None if nothing is left."""
    before = None
    while text != before:  # folding case can undo a composition, which may make more to fold
        before, text = text, " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return text or None


def normalise_letter(text: str) -> str | None:
    """The letter of a choice, upper case and without brackets: "(b)" and "B." give "B"; None for anything else."""
    found = re.fullmatch(r"\W*([A-Za-z])\W*", text)
    return found[1].upper() if found else None


def normalise_exact(text: str) -> str | None:
    """`text` as it is; None if it is empty."""
    return text or None
