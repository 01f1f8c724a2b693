"""Balance without a loss: a bias on each expert's score, for selection only, that follows the load."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from moesaic.configuration import Config
from moesaic.layer.schedule import Scheduled, value_at


class SelectionBiasUpdate(Config):
    """After each optimiser step, b_i <- b_i + rate * sign(mean load - load of i).

    The load is that of the whole step: all micro-batches in training mode, all data-parallel ranks, padding left out,
    and picks that a capacity dropped counted all the same. No gradient reaches b, no optimiser sees it.

    Sources: Wang et al. (arXiv 2408.15664, Algorithm 1), with the published rate of 0.001; DeepSeek-V3 (arXiv
    2412.19437, section 2.1.2), which sets the rate to 0 for the last 500 of 14,800 billion tokens.

    Attributes:
        rate: how far b moves; a `Schedule` to 0 freezes it towards the end of the training.
        rule: "sign" moves every b by the same amount; "proportional" by rate * (mean load - load) / mean load. The
            variant in the ablations of arXiv 2408.15664 multiplies by the difference of the counts themselves, which
            depends on the size of the batch.
        center: take the mean off each update, so that b does not drift as a whole. It changes no selection, except
            where `group_mask_value` is zero. The papers don't.
    """

    rate: Scheduled = 0.001
    rule: Literal["sign", "proportional"] = "sign"
    center: bool = True

    @torch.no_grad()
    def apply(self, bias_M: Tensor, chosen_M: Tensor, progress: float) -> None:
        """Move the bias in place.

        Args:
            bias_M: b, float32.
            chosen_M: selections of each column in the step, int64; all 0 leaves the bias as it is.
            progress: share of the training that is done.
        """
        load_M = chosen_M.to(device=bias_M.device, dtype=torch.float64)
        mean = load_M.mean()
        update_M = mean - load_M
        update_M = update_M.sign() if self.rule == "sign" else update_M / mean.clamp(min=1e-12)
        if self.center:
            update_M = update_M - update_M.mean()
        bias_M.add_((value_at(self.rate, progress) * update_M).to(bias_M.dtype))
