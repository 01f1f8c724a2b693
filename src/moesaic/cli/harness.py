"""Tasks of lm-evaluation-harness, by any decoding."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, cast

import torch
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteriaList

from moesaic.errors import ConfigError
from moesaic.infer.consistency import PromptBatch, SpecDecoding, row_seed
from moesaic.infer.consistency.stop import StopText
from moesaic.infer.decode import DecodingSpec

# What a task may say of sampling and beams, which a decoding says itself.
_DRAWING = frozenset({"do_sample", "num_beams", "temperature", "top_p", "top_k", "min_p", "typical_p"})


def run_harness(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: list[str],
    folder: Path | None,
    spec: DecodingSpec | None,
    *,
    limit: int | None,
    batch_size: int,
    seed: int,
) -> dict[str, dict[str, Any]]:
    """Metrics by task.

    Args:
        model: any causal language model.
        tokenizer: its own.
        tasks: names.
        folder: with more tasks than those of the harness.
        spec: how texts are generated and choices scored; None as the tasks say.
        limit: examples of a task.
        batch_size: rows of a batch.
        seed: of the spec's sampling.

    Raises:
        ConfigError: for an unknown task; for a field of the decoding that none of the tasks would use.
    """
    # Reading all tasks of the harness takes ten seconds.
    manager = None if folder is None else _Tasks(spec, include_path=str(folder), include_defaults=False)
    if manager is None or not set(tasks) <= set(manager.all_subtasks):
        manager = _Tasks(spec, include_path=None if folder is None else str(folder))
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        raise ConfigError(
            "--tasks", unknown[0], "is not a task", "`lm-eval ls tasks` lists them; --tasks-folder adds yours"
        )
    # lm-eval's decorators hide its signatures from type checkers.
    given = {"pretrained": model, "tokenizer": tokenizer, "batch_size": batch_size}
    wrapped = cast(Any, HFLM)(**given) if spec is None else DecodingLM(spec, seed, **given)
    outcome = cast(Any, simple_evaluate)(
        model=wrapped, tasks=tasks, task_manager=manager, limit=limit, bootstrap_iters=0
    )
    return {
        task: {name: value for name, value in metrics.items() if isinstance(value, float)}
        for task, metrics in outcome["results"].items()
    }


class _Tasks(TaskManager):
    """Tasks that are checked for use of the whole decoding once they are loaded."""

    def __init__(self, spec: DecodingSpec | None, **given: Any) -> None:
        super().__init__(**given)
        self._spec = spec

    def load(self, *args: Any, **kwargs: Any) -> Any:
        loaded = super().load(*args, **kwargs)
        if self._spec is not None:
            kinds = {task.get_config("output_type") for task in cast(Any, loaded)["tasks"].values()}
            self._spec.check_used(generated="generate_until" in kinds, scored=bool(kinds - {"generate_until"}))
        return loaded


class DecodingLM(cast(Any, HFLM)):
    """The harness's model, which generates and scores by a decoding.

    Stop texts and lengths, and what tasks say of penalties, are theirs; sampling and beams those of the decoding. Each request
    has a seed of its own, from `seed`, its prompt and how often this came before.
    """

    def __init__(self, spec: DecodingSpec, seed: int, **given: Any) -> None:
        super().__init__(**given)
        self._spec, self._seed = spec, seed
        self._asked: Counter[str] = Counter()

    def _model_call(self, inps: Tensor, attn_mask: Any = None, labels: Any = None) -> Tensor:
        with torch.no_grad():
            return self._spec.logits(self.model, {"input_ids": inps})

    def _model_generate(
        self, context: Tensor, max_length: int, stop: list[str], *, attention_mask: Tensor, **options: Any
    ) -> Tensor:
        length, stops = context.shape[1], [text for text in stop if text]
        decoding = SpecDecoding(self._spec, **{name: value for name, value in options.items() if name not in _DRAWING})
        batch = PromptBatch(
            context,
            attention_mask,
            tuple(map(self._row_seed, context, attention_mask)),
            max_length - length,
            StoppingCriteriaList([StopText(self.tokenizer, stops, length)]) if stops else None,
            self.tokenizer.pad_token_id,
        )
        with torch.no_grad():
            return decoding(self.model, batch)

    def _row_seed(self, ids_S: Tensor, mask_S: Tensor) -> int:
        prompt = str(self.tokenizer.decode(ids_S[mask_S.bool()]))
        self._asked[prompt] += 1
        return row_seed(self._seed, prompt, self._asked[prompt] - 1)
