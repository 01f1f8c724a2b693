"""Sizes, rates and links as people write them: "80GB", "400Gb/s:10us", "312T"."""

from __future__ import annotations

import re
from dataclasses import dataclass

from moesaic.errors import ConfigError

_DECIMAL = {"": 1e0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
_BINARY = {"Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40}
_SECONDS = {"s": 1e0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
_NUMBER = r"(\d+(?:\.\d*)?(?:[eE][+-]?\d+)?)"


@dataclass(frozen=True)
class Link:
    """What a message costs: alpha + bytes * beta.

    Attributes:
        seconds_per_byte: beta, one over the bandwidth that one process has.
        latency: alpha, seconds before a message's first byte arrives.
    """

    seconds_per_byte: float
    latency: float = 0.0

    def __str__(self) -> str:
        return f"{short(1 / self.seconds_per_byte)}B/s:{self.latency * 1e6:g}us"


def read_bytes(field: str, text: str) -> float:
    """Bytes of "80GB", "512MB" or "24GiB".

    Raises:
        ConfigError: naming `field`, for an unknown unit.
    """
    found = re.fullmatch(_NUMBER + r"\s*([kMGTP]?|[KMGT]i)B", text.strip())
    if found is None or float(found[1]) == 0:
        raise ConfigError(field, text, "is not a size", "write it as 80GB (10^9 bytes) or 80GiB (2^30 bytes)")
    return float(found[1]) * (_BINARY | _DECIMAL)[found[2]]


def read_rate(field: str, text: str) -> float:
    """Operations a second of "312T" or "2.5e12".

    Raises:
        ConfigError: naming `field`, for an unknown unit.
    """
    found = re.fullmatch(_NUMBER + r"\s*([kMGTP]?)", text.strip())
    if found is None or float(found[1]) == 0:
        raise ConfigError(field, text, "is not a rate", "write floating-point operations a second as 200T")
    return float(found[1]) * _DECIMAL[found[2]]


def read_link(field: str, text: str) -> Link:
    """The link of "50GB/s", "400Gb/s" (bits) or, with a latency, "50GB/s:10us".

    Raises:
        ConfigError: naming `field`, for an unknown unit.
    """
    found = re.fullmatch(_NUMBER + r"\s*([kMGTP]?|[KMGT]i)([Bb])/s(?::" + _NUMBER + r"\s*(s|ms|us|ns))?", text.strip())
    if found is None or float(found[1]) == 0:
        raise ConfigError(
            field, text, "is not a link", "write bandwidth and latency as 50GB/s:10us, or 400Gb/s:10us in bits"
        )
    number, prefix, unit, latency, seconds = found.groups()
    rate = float(number) * (_BINARY | _DECIMAL)[prefix] / (8 if unit == "b" else 1)
    return Link(1 / rate, float(latency) * _SECONDS[seconds] if latency else 0.0)


def short(number: float) -> str:
    """Three digits and a decimal prefix: 3_456_000 is "3.46M"."""
    for prefix in ("T", "G", "M", "k"):
        if number >= _DECIMAL[prefix]:
            return f"{number / _DECIMAL[prefix]:.3g}{prefix}"
    return f"{number:.3g}"
