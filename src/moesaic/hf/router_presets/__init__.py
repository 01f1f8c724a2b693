"""What the routers of transformers' MoE families are in our fields.

`router_preset(config)` reads any stock MoE config as a router config of ours that picks the same experts with the same
weights. docs/router-presets.md lists all families; tests/parity checks each router class against the stock code.
"""

from __future__ import annotations

from moesaic.hf.router_presets.base import Picks, RouterPreset, unsupported
from moesaic.hf.router_presets.lookup import presets_of, router_preset, rule_of
from moesaic.hf.router_presets.table import ROUTER_PRESETS, UNSUPPORTED_ROUTERS

__all__ = [
    "ROUTER_PRESETS",
    "UNSUPPORTED_ROUTERS",
    "Picks",
    "RouterPreset",
    "presets_of",
    "router_preset",
    "rule_of",
    "unsupported",
]
