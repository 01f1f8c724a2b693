"""Labels of tokens, for losses that tell apart modalities or tasks."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.layer.record import RoutingContext

Label = Literal["modality", "task"]


def label_of_tokens(context: RoutingContext, label: Label, num_tokens: int, loss: str) -> Tensor:
    """Modality of each token, or the task of its sequence, int64 (T,).

    Raises:
        ConfigError: if the context does not hold it.
    """
    if label == "modality" and context.modality_T is not None:
        return context.modality_T
    if label == "task" and context.task_B is not None:
        return context.task_B.repeat_interleave(num_tokens // context.batch_size)
    raise ConfigError(label, None, f"is needed by the balance loss {loss}", f"call the model with `{label}_ids`")
