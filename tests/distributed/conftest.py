"""Fixtures of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.distributed.spawn import Worlds


@pytest.fixture(scope="module")
def worlds() -> Iterator[Worlds]:
    """`run_ranks` with processes that stay for all tests of a file."""
    found = Worlds()
    yield found
    found.end()
