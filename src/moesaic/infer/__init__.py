"""Inference: decoding at the speed of memory."""

from __future__ import annotations

from moesaic.infer.decode import FastDecoding, fast_decoding

__all__ = ["FastDecoding", "fast_decoding"]
