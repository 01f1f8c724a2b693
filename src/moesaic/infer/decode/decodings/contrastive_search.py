"""Contrastive search: likely tokens that do not repeat the context."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList

from moesaic.errors import ConfigError
from moesaic.hf.generation_view import generate_with
from moesaic.infer.decode.contrast import Lookahead, LookaheadProcessor
from moesaic.infer.decode.decodings.base import DecodingStrategy


class ContrastiveSearch(DecodingStrategy):
    """Contrastive search (arXiv 2202.06417, section 3.3).

        model.generate(**inputs, custom_generate=ContrastiveSearch(k=5, penalty=0.6))

    Of the `k` likeliest tokens the next one has the highest (1 - penalty) probability - penalty similarity, where the similarity
    is the largest cosine between the last hidden state that the model would have for the token and those of all tokens before
    it. Padding is no context. Every step runs the model on k rows for each prompt. Nothing is drawn, and there are no beams.

    All processors act before candidates are taken. A candidate that they rule out is never chosen, although
    fewer than `k` may be left; the implementation of transformers gives it probability 0, with which it can win.

    Attributes:
        k: candidates; 1 is greedy decoding.
        penalty: in [0, 1]; 0 is greedy decoding.
    """

    samples: ClassVar[bool] = False
    searches: ClassVar[bool] = False

    type: Literal["contrastive_search"] = "contrastive_search"
    k: int = Field(default=5, ge=1)
    penalty: float = Field(default=0.6, ge=0, le=1)

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """See `DecodingStrategy`. Scores that `generate` returns are those of the candidates, and -inf for other tokens.

        Raises:
            ConfigError: if `generate` was asked to sample or for beams, or there are fewer tokens than candidates.
            UnsupportedModel: if the model is no decoder, or returns no hidden states.
        """
        if generation_config.do_sample:
            raise ConfigError(
                "do_sample", True, "does not go with contrastive search, which draws nothing", "leave it out"
            )
        if (generation_config.num_beams or 1) > 1:
            raise ConfigError(
                "num_beams",
                generation_config.num_beams,
                "do not go with contrastive search",
                "use one, and k candidates",
            )
        lookahead = Lookahead(model, self.k, self.penalty)
        return generate_with(
            model,
            lookahead,
            input_ids,
            generation_config,
            logits_processor=LogitsProcessorList([*logits_processor, LookaheadProcessor(lookahead)]),
            stopping_criteria=stopping_criteria,
            synced_gpus=synced_gpus,
            streamer=streamer,
            **model_kwargs,
        )
