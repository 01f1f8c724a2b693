"""Weights to weights: making one model out of another."""

from __future__ import annotations

from moesaic.transform.upcycle import copy_spec, upcycle

__all__ = ["copy_spec", "upcycle"]
