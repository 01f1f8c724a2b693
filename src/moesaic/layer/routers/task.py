"""Routing by task: a gate for each task, a task embedding, or experts that each task is given."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import NonNegativeInt, PositiveInt, model_validator
from torch import Tensor, nn

from moesaic.errors import ConfigError
from moesaic.layer.record import Routing, RoutingContext
from moesaic.layer.routers.base import BaseRouterConfig, Need, Router, check_top_k, fill_buffer
from moesaic.layer.routers.parts.inputs import ids_of, linear
from moesaic.layer.routers.scores import ScoreFunction, at, normalize, score, top_k


class TaskConfig(BaseRouterConfig):
    """Fields of routing by the task of a sequence.

    Attributes:
        num_tasks: number of tasks.
        kind: "gate": each task has its own linear gate (MMoE: Ma et al., KDD 2018, which mixes all experts: set
            top_k to their number); "embedding": the gate reads an embedding of the task (Task-level MoE, arXiv
            2205.12701); "fixed": each task has its experts, all of which run with equal weight (M2M-100's
            language-specific layers, arXiv 2010.11125).
        top_k: experts for each token (K), where they are learned.
        embedding_input: the gate reads the task embedding alone, in the "replace" of the token, or "add"ed to it.
        score_function: how logits become scores.
        normalize_top_k: divide the K weights by their sum.
        experts: for "fixed": the experts of each task; None splits all experts evenly in index order.
    """

    type: Literal["task"] = "task"
    num_tasks: PositiveInt
    kind: Literal["gate", "embedding", "fixed"] = "gate"
    top_k: PositiveInt | None = None
    embedding_input: Literal["replace", "add"] = "replace"
    score_function: ScoreFunction = "softmax"
    normalize_top_k: bool = False
    experts: tuple[tuple[NonNegativeInt, ...], ...] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> TaskConfig:
        fixed = self.kind == "fixed"
        if self.top_k is None and not fixed:
            raise ConfigError("top_k", None, f"is missing, and kind: {self.kind} needs it", "give the experts a token")
        unread = {"experts"} if not fixed else {"top_k", "score_function", "normalize_top_k"}
        if self.kind != "embedding":
            unread.add("embedding_input")
        for field in sorted(unread):
            value: Any = getattr(self, field)
            if value != type(self).model_fields[field].default:
                raise ConfigError(field, value, f"has no effect with kind: {self.kind}", "leave it out")
        if self.experts is not None and len(self.experts) != self.num_tasks:
            raise ConfigError("experts", len(self.experts), "is the number of lists", f"give {self.num_tasks} of them")
        for task, chosen in enumerate(self.experts or ()):
            if not chosen or len(set(chosen)) != len(chosen):
                raise ConfigError(f"experts[{task}]", chosen, "is empty or names an expert twice", "correct it")
        return self

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"task"})

    @property
    def may_skip(self) -> bool:
        return self.experts is not None and len({len(chosen) for chosen in self.experts}) > 1

    @property
    def unranked(self) -> str | None:
        return "a table of tasks names the experts, and ranks no others" if self.kind == "fixed" else None

    def check(self, num_experts: int) -> None:
        if self.top_k is not None:
            check_top_k(self.top_k, num_experts)
        elif self.experts is None:
            if num_experts % self.num_tasks:
                raise ConfigError(
                    "num_tasks", self.num_tasks, f"does not divide num_experts ({num_experts})", "give `experts`"
                )
        else:
            for task, chosen in enumerate(self.experts):
                if max(chosen) >= num_experts:
                    raise ConfigError(
                        f"experts[{task}]", max(chosen), "is not an expert", f"choose 0 to {num_experts - 1}"
                    )

    def experts_of_tasks(self, num_experts: int) -> list[list[int]]:
        """The experts of each task, for "fixed"."""
        if self.experts is not None:
            return [list(chosen) for chosen in self.experts]
        size = num_experts // self.num_tasks
        return [list(range(task * size, (task + 1) * size)) for task in range(self.num_tasks)]

    def build(self, hidden_size: int, num_experts: int) -> TaskRouter:
        self.check(num_experts)
        return TaskRouter(self, hidden_size, num_experts)


class TaskRouter(Router[TaskConfig]):
    """Experts by task.

    Tensors: the parameters `weight`, (tasks, N, D) for "gate" and (N, D) for "embedding", and `task_embedding`
    (tasks, D); the buffer `task_experts` (tasks, K), int64, for "fixed", N where a task has fewer than K experts.
    """

    task_experts: Tensor | None

    def __init__(self, config: TaskConfig, hidden_size: int, num_experts: int) -> None:
        table = config.experts_of_tasks(num_experts) if config.kind == "fixed" else []
        super().__init__(config, num_experts, config.top_k or max(map(len, table)))
        self.table = table
        self.weight = self.task_embedding = None
        if config.kind == "gate":
            self.looked_up = ("weight",)
            self.weight = nn.Parameter(torch.empty(config.num_tasks, num_experts, hidden_size))
        elif config.kind == "embedding":
            self.looked_up = ("task_embedding",)
            self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
            self.task_embedding = nn.Parameter(torch.empty(config.num_tasks, hidden_size))
        fixed = torch.empty(config.num_tasks, self.top_k, dtype=torch.int64) if config.kind == "fixed" else None
        self.register_buffer("task_experts", fixed)
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02) -> None:
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=std)
        if self.task_experts is not None:
            rows = [chosen + [self.num_experts] * (self.top_k - len(chosen)) for chosen in self.table]
            fill_buffer(self.task_experts, torch.tensor(rows))

    def forward(self, x_TD: Tensor, context: RoutingContext | None = None) -> Routing:
        task_B = ids_of(context, "task", self.config.num_tasks, field="num_tasks")
        task_T = task_B.unsqueeze(-1).expand(-1, len(x_TD) // len(task_B)).reshape(-1)
        if self.task_experts is not None:
            return self._fixed(x_TD, self.task_experts[task_T])
        assert self.weight is not None
        logits_TN = self._logits(x_TD, self.weight, task_B, task_T)
        scores_TN = score(logits_TN, self.config.score_function)
        index_TK = top_k(scores_TN.detach(), self.top_k, stable=True)
        weight_TK = scores_TN.gather(-1, index_TK)
        if self.config.normalize_top_k:
            weight_TK = normalize(weight_TK)
        return Routing(
            index_TK=index_TK,
            weight_TK=weight_TK,
            logits_TN=logits_TN,
            scores_TN=scores_TN,
            selection_TN=scores_TN.detach(),
        )

    def _weigh(self, routing: Routing, index_TK: Tensor, kept_TK: Tensor) -> Tensor:
        if self.task_experts is not None:
            return kept_TK.to(routing.scores_TN.dtype) / kept_TK.sum(-1, keepdim=True)
        weight_TK = at(routing.scores_TN, index_TK, kept_TK)
        return normalize(weight_TK) if self.config.normalize_top_k else weight_TK

    def _logits(self, x_TD: Tensor, weight: Tensor, task_B: Tensor, task_T: Tensor) -> Tensor:
        precision = self.precision(x_TD)
        if self.task_embedding is not None:
            input_TD = self.task_embedding.to(precision)[task_T]
            return linear(input_TD + x_TD if self.config.embedding_input == "add" else input_TD, weight)
        x_BLD = x_TD.to(precision).view(len(task_B), -1, x_TD.shape[-1])
        with torch.autocast(x_TD.device.type, enabled=False):
            return torch.bmm(x_BLD, weight.to(precision)[task_B].mT).reshape(len(x_TD), self.num_experts)

    def _fixed(self, x_TD: Tensor, index_TK: Tensor) -> Routing:
        picked_TK = (index_TK < self.num_experts).to(self.precision(x_TD))
        scores_TN = picked_TK.new_zeros(len(x_TD), self.num_experts + 1).scatter(-1, index_TK, 1.0)[:, :-1]
        return Routing(
            index_TK=index_TK,
            weight_TK=picked_TK / picked_TK.sum(-1, keepdim=True),
            logits_TN=torch.zeros_like(scores_TN),
            scores_TN=scores_TN,
            selection_TN=scores_TN,
        )

    @property
    def picks(self) -> float:
        """Experts that a token runs, tasks taken as equally frequent."""
        return sum(map(len, self.table)) / len(self.table) if self.table else self.top_k
