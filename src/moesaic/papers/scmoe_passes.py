"""How far a weak pass is from the strong one along the same text: distributions, and experts."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moesaic.infer.decode.overrides import override_routing
from moesaic.trace import record

EXPRESSION = re.compile(r"[\d+\-*/=<>.,$%#]+")
"""Tokens of expressions, as the paper's table 5 sets them apart from words."""


AMATEUR = "amateur"
"""Name of the second model among the passes."""


@dataclass(frozen=True)
class Answered:
    """A prompt and its continuation, as token ids."""

    prompt: Sequence[int]
    answer: Sequence[int]


@dataclass
class Distance:
    """How far a pass is from the strong one.

    Attributes:
        kl: sum of KL(strong || weak) in nats over all predicted tokens.
        tokens: number of them.
        kl_expression: the same of tokens that are part of an expression.
        expressions: number of those.
        picks: picks of the weak pass at the positions that predict, by decoder layer.
        unchosen_by_layer: those that the strong pass, with its own hidden states, did not make there.
    """

    kl: float = 0.0
    tokens: int = 0
    kl_expression: float = 0.0
    expressions: int = 0
    picks: dict[int, int] = field(default_factory=dict)
    unchosen_by_layer: dict[int, int] = field(default_factory=dict)

    @property
    def mean_kl(self) -> float:
        """Nats for a token."""
        return self.kl / max(self.tokens, 1)

    @property
    def mean_kl_expression(self) -> float:
        """Nats for a token of an expression; nan without any."""
        return self.kl_expression / self.expressions if self.expressions else float("nan")

    @property
    def mean_kl_other(self) -> float:
        """Nats for a token of none; nan without any."""
        other = self.tokens - self.expressions
        return (self.kl - self.kl_expression) / other if other else float("nan")

    @property
    def unchosen(self) -> float:
        """Share of the weak pass's picks, over all layers; nan for a pass of another model."""
        picks = sum(self.picks.values())
        return sum(self.unchosen_by_layer.values()) / picks if picks else float("nan")


@torch.no_grad()
def distances(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    answered: Sequence[Answered],
    weak: Sequence[str],
    *,
    batch_size: int,
    amateur: PreTrainedModel | None = None,
) -> dict[str, Distance]:
    """Compare passes on texts that the strong one decoded, at the positions that predict the answers.

    Each pass reads the whole text with its own routing in every layer and so has hidden states of its own, as in decoding.

    Args:
        model: its own routing is the strong pass.
        tokenizer: its own.
        answered: prompts with answers.
        weak: routings to compare.
        batch_size: texts in a batch.
        amateur: a second model of the same vocabulary to compare too, as `amateur`.
    """
    found = {name: Distance() for name in (*weak, *([AMATEUR] if amateur is not None else []))}
    expression_V = _expressions(tokenizer, model.config.get_text_config().vocab_size)
    for batch in _batches(answered, batch_size, model.device):
        strong = _run(model, batch)
        for name, distance in found.items():
            if name == AMATEUR and amateur is not None:
                other = _Pass(_log_probabilities(amateur, batch), {}, {})
            else:
                with override_routing(model, name):
                    other = _run(model, batch)
            _add(distance, strong, other, expression_V[batch.next_P])
    return found


@dataclass(frozen=True)
class _Batch:
    """Texts, padded on the right: ids and mask (B, S), which positions predict a token of an answer, and which token."""

    ids_BS: Tensor
    mask_BS: Tensor
    predicts_BS: Tensor
    next_P: Tensor


@dataclass(frozen=True)
class _Pass:
    """Log-probabilities at the positions that predict, float32 (P, V) on the CPU; the picks there, (P, K), and N, by layer."""

    log_PV: Tensor
    picks: Mapping[int, Tensor]
    experts: Mapping[int, int]


def _batches(answered: Sequence[Answered], batch_size: int, device: torch.device) -> Iterator[_Batch]:
    for first in range(0, len(answered), batch_size):
        part = answered[first : first + batch_size]
        length = max(len(text.prompt) + len(text.answer) for text in part)
        ids_BS, mask_BS = (torch.zeros(len(part), length, dtype=torch.long) for _ in range(2))
        predicts_BS = torch.zeros(len(part), length, dtype=torch.bool)
        for row, text in enumerate(part):
            end = len(text.prompt) + len(text.answer)
            ids_BS[row, :end] = torch.tensor([*text.prompt, *text.answer])
            mask_BS[row, :end] = 1
            predicts_BS[row, len(text.prompt) - 1 : end - 1] = True
        next_P = ids_BS[:, 1:][predicts_BS[:, :-1]]
        yield _Batch(ids_BS.to(device), mask_BS.to(device), predicts_BS.to(device), next_P)


def _run(model: PreTrainedModel, batch: _Batch) -> _Pass:
    """One pass with the routing that the model has now."""
    with record(model) as trace:
        log_PV = _log_probabilities(model, batch)
    predicts_T = batch.predicts_BS[batch.mask_BS.bool()].cpu()  # a trace leaves padding out
    picks = {index: layer.index_TK[predicts_T] for index, layer in trace.layers.items() if layer.selects}
    return _Pass(log_PV, picks, {index: trace.layers[index].num_experts for index in picks})


def _log_probabilities(model: PreTrainedModel, batch: _Batch) -> Tensor:
    logits_BSV = model(input_ids=batch.ids_BS, attention_mask=batch.mask_BS, use_cache=False).logits
    return F.log_softmax(logits_BSV[batch.predicts_BS].float(), dim=-1).cpu()


def _add(distance: Distance, strong: _Pass, weak: _Pass, expression_P: Tensor) -> None:
    kl_P = F.kl_div(weak.log_PV, strong.log_PV, reduction="none", log_target=True).sum(-1).double()
    distance.kl += float(kl_P.sum())
    distance.tokens += len(kl_P)
    distance.kl_expression += float(kl_P[expression_P].sum())
    distance.expressions += int(expression_P.sum())
    for layer, weak_PK in weak.picks.items():
        real_PK = weak_PK < weak.experts[layer]
        chosen_PK = (weak_PK[:, :, None] == strong.picks[layer][:, None, :]).any(-1)
        distance.picks[layer] = distance.picks.get(layer, 0) + int(real_PK.sum())
        distance.unchosen_by_layer[layer] = distance.unchosen_by_layer.get(layer, 0) + int((real_PK & ~chosen_PK).sum())


def _expressions(tokenizer: PreTrainedTokenizerBase, size: int) -> Tensor:
    """Which tokens are part of an expression, bool (V,)."""
    texts = tokenizer.batch_decode([[token] for token in range(min(size, len(tokenizer)))])
    found = [bool(EXPRESSION.fullmatch(text.strip())) for text in texts]
    return torch.tensor(found + [False] * (size - len(found)))
