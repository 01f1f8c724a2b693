"""Loads the native CPU library and describes its calls; None and one log line where it was not built.

The library is plain C behind `ctypes`: it knows addresses and sizes, nothing of torch, so one build serves every
version of torch. It runs on the OpenMP threads that torch started, if torch has them.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
from ctypes import POINTER, c_char_p, c_float, c_int32, c_int64, c_long, c_void_p
from pathlib import Path

import torch

from moesaic.errors import UnsupportedKernel
from moesaic.layer.kernels.native.sources import fingerprint

logger = logging.getLogger(__name__)

PATH = Path(__file__).with_name("libmoesaic.so")
ISA_VARIABLE = "MOESAIC_ISA"

# Codes of csrc/isa.h.
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class ExpertsCall(ctypes.Structure):
    """`moesaic_experts` of csrc/experts.h, field by field."""

    _fields_ = (
        ("type", c_int32),
        ("activation", c_int32),
        ("gated", c_int32),
        ("interleaved", c_int32),
        ("up_transposed", c_int32),
        ("down_transposed", c_int32),
        ("alpha", c_float),
        ("limit", c_float),
        ("threads", c_int64),
        ("tokens", c_int64),
        ("top_k", c_int64),
        ("hidden", c_int64),
        ("width", c_int64),
        ("num_groups", c_int64),
        ("expert", c_void_p),
        ("row_end", c_void_p),
        ("pick", c_void_p),
        ("weight", c_void_p),
        ("x", c_void_p),
        ("x_stride", c_int64),
        ("up", c_void_p),
        ("up_expert_stride", c_int64),
        ("up_row_stride", c_int64),
        ("down", c_void_p),
        ("down_expert_stride", c_int64),
        ("down_row_stride", c_int64),
        ("up_bias", c_void_p),
        ("up_bias_stride", c_int64),
        ("down_bias", c_void_p),
        ("down_bias_stride", c_int64),
        ("saved_up", c_void_p),
        ("y", c_void_p),
    )


class BackwardCall(ctypes.Structure):
    """`moesaic_backward` of csrc/backward.h, field by field."""

    _fields_ = (
        ("forward", ExpertsCall),
        ("num_experts", c_int64),
        ("y_grad", c_void_p),
        ("y_grad_stride", c_int64),
        ("weight_grad", c_void_p),
        ("x_grad", c_void_p),
        ("up_grad", c_void_p),
        ("down_grad", c_void_p),
        ("up_bias_grad", c_void_p),
        ("down_bias_grad", c_void_p),
    )


@functools.cache
def load() -> ctypes.CDLL | None:
    """The library, or None with one log line that says why it is not used."""
    library, reason = _found()
    if library is None:
        logger.warning("native CPU kernels are not used (%s); experts run on torch's own operations", reason)
        return None
    library.moesaic_choose_isa.argtypes, library.moesaic_choose_isa.restype = [c_char_p], c_char_p
    library.moesaic_use_openmp.argtypes, library.moesaic_use_openmp.restype = [c_void_p], None
    library.moesaic_order.argtypes = [c_void_p, c_long, c_long, c_void_p, c_void_p, c_void_p]
    library.moesaic_order.restype = c_long
    for way in ("", "_columns", "_packed", "_streamed"):
        forward = getattr(library, f"moesaic_experts_forward{way}")
        forward.argtypes, forward.restype = [POINTER(ExpertsCall)], c_long
    library.moesaic_experts_backward.argtypes = [POINTER(BackwardCall)]
    library.moesaic_experts_backward.restype = c_long
    library.moesaic_huge_pages.argtypes, library.moesaic_huge_pages.restype = [c_void_p, c_long], None
    openmp = _openmp()
    library.moesaic_use_openmp(openmp)
    at_most = os.environ.get(ISA_VARIABLE)
    isa = library.moesaic_choose_isa(at_most.encode() if at_most else None)
    if isa is None:
        names = "AVX-512 with bfloat16, AVX-512, AVX2, portable"
        raise ValueError(f"{ISA_VARIABLE} = {at_most!r} is no instruction set; choose one of {names}")
    pool = "torch's OpenMP threads" if openmp else "threads of their own, no OpenMP runtime was found in this process"
    logger.info("native CPU kernels: %s, on %s", isa.decode(), pool)
    return library


@functools.cache
def _found() -> tuple[ctypes.CDLL | None, str]:
    return open_library(PATH, PATH.parent / "csrc")


def open_library(path: Path, sources: Path) -> tuple[ctypes.CDLL | None, str]:
    """The library, or None and why not. One that was built from other sources would misread what it is handed."""
    if not path.exists():
        return None, "not built: no C compiler when moesaic was installed"
    try:
        library = ctypes.CDLL(str(path))
        library.moesaic_sources.restype = c_char_p
        built_from = library.moesaic_sources().decode()
    except (OSError, AttributeError) as error:
        return None, str(error)
    if sources.is_dir() and built_from != fingerprint(sources):
        return None, "built from other sources: install moesaic again"
    return library, ""


@torch.compiler.assume_constant_result
def why_not() -> str | None:
    """Why there is no library, or None if there is one; a compiler takes the answer as a constant."""
    return None if load() is not None else _found()[1]


def loaded() -> ctypes.CDLL:
    """The library, for calls that come after a kernel was chosen."""
    library = load()
    if library is None:
        raise UnsupportedKernel(f"there are no native CPU kernels ({why_not()}); choose experts.kernel = grouped")
    return library


def _openmp() -> int | None:
    """Address of GOMP_parallel in the OpenMP runtime that torch uses; LLVM's and Intel's offer it too."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return None
    paths = {line.split(maxsplit=5)[-1] for line in maps.read_text().splitlines() if ".so" in line}
    for path in sorted(paths):
        if Path(path).name.startswith(("libgomp", "libomp", "libiomp")):
            try:
                return ctypes.cast(ctypes.CDLL(path).GOMP_parallel, c_void_p).value
            except (OSError, AttributeError):
                continue
    return None
