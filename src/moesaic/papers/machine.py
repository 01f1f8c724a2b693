"""What measurements ran on: processor, accelerator, and versions."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch
import transformers

import moesaic


def describe_machine() -> str:
    """Machine and versions in a sentence."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    device = f", {torch.cuda.get_device_name()}" if accelerator is not None and accelerator.type == "cuda" else ""
    return (
        f"{_processor()} with {os.cpu_count()} cores{device}, Python {platform.python_version()}, "
        f"PyTorch {torch.__version__}, transformers {transformers.__version__}, moesaic {moesaic.__version__}"
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
