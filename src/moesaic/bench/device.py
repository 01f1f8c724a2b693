"""What the device that is measured is like."""

from __future__ import annotations

from pathlib import Path

import torch


def synchronise(device: str) -> None:
    """Wait for an accelerator."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def cache_bytes(device: str) -> int:
    """Size of the last cache before memory; 32 MiB if the machine doesn't say."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    for level in (3, 2):
        path = Path(f"/sys/devices/system/cpu/cpu0/cache/index{level}/size")
        if path.is_file():
            text = path.read_text(encoding="utf-8").strip()
            return int(text[:-1]) * units[text[-1]] if text[-1] in units else int(text)
    return 32 << 20
