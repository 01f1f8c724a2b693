"""The likeliest next tokens read before one of them is chosen, by how little its hidden state repeats those before it."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import LogitsProcessor, PreTrainedModel

from moesaic.errors import ConfigError, UnsupportedModel
from moesaic.hf.next_step import next_inputs
from moesaic.infer.decode.contrast.passes import batch_of, check_fresh, output_rows, rows_of


class Lookahead:
    """Contrastive search as the step (`moesaic.hf.generation_view.Step`) of transformers' own loop.

    `choose` runs the model on all candidates, chooses one for each row, and keeps its output, which is then that of the step
    for the chosen token: no token is read twice. Candidates of a row stand side by side in a batch of B x k rows, on a copy of
    the cache; the cache that the loop has is never ahead of it.

    Args:
        model: the model.
        k: candidates of each row.
        penalty: weight of the similarity against that of the probability.

    Raises:
        UnsupportedModel: if the model is no decoder.
    """

    def __init__(self, model: PreTrainedModel, k: int, penalty: float) -> None:
        if model.config.is_encoder_decoder:
            raise UnsupportedModel(f"{type(model).__name__} is no decoder; give a causal language model")
        self._model, self._k, self._penalty = model, k, penalty
        self._context_BSD: Tensor | None = None
        self._inputs: dict[str, Any] = {}
        self._output: Any = None
        self._chosen: Any = None

    def __call__(self, inputs: dict[str, Any], /) -> Any:
        """The output of a forward pass; for tokens that were chosen here, the one they were chosen by."""
        if self._chosen is not None:
            self._inputs, self._output, self._chosen = inputs, self._chosen, None
            return self._output
        if self._context_BSD is None:
            check_fresh(inputs, batch_of(inputs))
            if getattr(inputs.get("past_key_values"), "is_compileable", False):
                raise ConfigError(
                    "cache_implementation", "static", "has no room for candidates beside each other", "leave it out"
                )
        output = self._model(**{**inputs, "output_hidden_states": True})
        states_BSD = _directions(self._model, output)
        if self._context_BSD is not None and inputs.get("use_cache") is not False:  # a prompt in parts
            states_BSD = torch.cat([self._context_BSD, states_BSD], 1)
        self._context_BSD = states_BSD
        self._inputs, self._output = inputs, _without_unasked(output, inputs)
        return output

    def reorder(self, cache: Any, rows_B: Tensor, /) -> Any:
        """Never asked for: there are no beams."""
        raise ConfigError("num_beams", "several", "do not go with contrastive search", "use one")

    def choose(self, scores: Tensor) -> Tensor:
        """Contrastive scores (B, V) of the candidates, -inf for all other tokens and for those that are ruled out.

        Args:
            scores: logits of the step, (B, V), processed.

        Raises:
            ConfigError: if there are fewer tokens than candidates.
        """
        if self._k > scores.shape[-1]:
            raise ConfigError(
                "k", self._k, f"is more than there are tokens ({scores.shape[-1]})", "give fewer candidates"
            )
        assert self._context_BSD is not None, "the prompt is read first"
        probability_BK, token_BK = scores.softmax(-1).topk(self._k, dim=-1)
        output, states_BKD = self._read(token_BK)
        similarity_BKS = states_BKD @ self._context_BSD.mT
        if (mask_BS := self._real()) is not None:
            similarity_BKS = similarity_BKS.masked_fill(mask_BS[:, None] == 0, -torch.inf)
        repetition_BK = similarity_BKS.amax(-1).to(scores.device)
        value_BK = (1 - self._penalty) * probability_BK - self._penalty * repetition_BK
        value_BK = value_BK.masked_fill(scores.gather(1, token_BK) == -torch.inf, -torch.inf)
        best_B = value_BK.argmax(-1)
        self._keep(output, states_BKD, best_B)
        # The loop takes the first of the highest: exactly one is.
        found_BV = torch.full_like(scores, -torch.inf).scatter_(1, token_BK, value_BK.to(scores.dtype))
        tied_BK = (value_BK == value_BK.gather(1, best_B[:, None])).scatter(1, best_B[:, None], False)
        return found_BV.scatter_(1, token_BK, value_BK.masked_fill(tied_BK, -torch.inf).to(scores.dtype))

    def _read(self, token_BK: Tensor) -> tuple[Any, Tensor]:
        """The model's output for all candidates, (B x K) rows, and the directions of their hidden states, (B, K, D)."""
        batch, k = token_BK.shape
        rows_R = torch.arange(batch, device=token_BK.device).repeat_interleave(k)
        inputs = rows_of(next_inputs(self._model, self._inputs, self._output, token_BK[:, 0]), rows_R)
        ids_RS = inputs["input_ids"]
        ids_RS[:, -1] = token_BK.flatten().to(ids_RS.device)
        if (cache := self._output.get("past_key_values")) is not None:
            cache = copy.deepcopy(cache)
            cache.reorder_cache(rows_R)
            inputs["past_key_values"] = cache
        output = self._model(**{**inputs, "output_hidden_states": True})
        return output, _directions(self._model, output)[:, -1].unflatten(0, (batch, k))

    def _keep(self, output: Any, states_BKD: Tensor, best_B: Tensor) -> None:
        """Make the chosen candidates' output that of the next step."""
        batch, k = states_BKD.shape[:2]
        rows_B = torch.arange(batch, device=best_B.device) * k + best_B
        if (cache := output.get("past_key_values")) is not None:
            cache.reorder_cache(rows_B)
        self._chosen = output_rows(_without_unasked(output, self._inputs), rows_B, batch * k)
        chosen_BD = states_BKD[torch.arange(batch, device=states_BKD.device), best_B.to(states_BKD.device)]
        assert self._context_BSD is not None
        self._context_BSD = torch.cat([self._context_BSD, chosen_BD[:, None]], 1)

    def _real(self) -> Tensor | None:
        """(B, S), 0 for padding; None where there is none."""
        mask = self._inputs.get("attention_mask")
        if mask is None:
            return None
        assert self._context_BSD is not None
        return mask.to(self._context_BSD.device)


class LookaheadProcessor(LogitsProcessor):
    """`Lookahead.choose` as the last processor of the loop."""

    def __init__(self, lookahead: Lookahead) -> None:
        self._lookahead = lookahead

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """See `Lookahead.choose`."""
        return self._lookahead.choose(scores)


def _directions(model: PreTrainedModel, output: Any) -> Tensor:
    """Last hidden states (B, S, D) of length one, in float32."""
    if output.hidden_states is None:
        raise UnsupportedModel(f"{type(model).__name__} returns no hidden states; give a model that does")
    return functional.normalize(output.hidden_states[-1].float(), dim=-1)


def _without_unasked(output: Any, inputs: dict[str, Any]) -> Any:
    if not inputs.get("output_hidden_states"):
        output.hidden_states = None  # those of a long prompt are large
    return output
