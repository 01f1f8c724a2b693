"""Inference: decoding."""
