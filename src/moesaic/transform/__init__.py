"""Weights to weights: making one model out of another."""

from __future__ import annotations

from moesaic.transform.add_null_experts import add_null_experts
from moesaic.transform.upcycle import copy_spec, upcycle

__all__ = ["add_null_experts", "copy_spec", "upcycle"]
