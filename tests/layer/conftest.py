"""What tests of the native library share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from moesaic.layer.kernels.native import library

ISAS = ["AVX-512 with bfloat16", "AVX-512", "AVX2", "portable"]


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set of this machine in turn, in use while the test runs."""
    native = library.loaded()
    best = native.moesaic_choose_isa(None)
    try:
        if native.moesaic_choose_isa(request.param.encode()).decode() != request.param:
            pytest.skip(f"this machine has no {request.param}")
        yield request.param
    finally:
        native.moesaic_choose_isa(best)
