"""Decoding: computing it natively."""

from __future__ import annotations

from moesaic.infer.decode.fast import FastDecoding, fast_decoding

__all__ = ["FastDecoding", "fast_decoding"]
