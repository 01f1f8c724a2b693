"""The `moesaic` command: one command a file, all reading the same YAML schema."""

from __future__ import annotations

from moesaic.cli.app import main

__all__ = ["main"]
