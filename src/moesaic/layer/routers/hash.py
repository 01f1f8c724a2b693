"""Hash routing: a token's experts follow from its id, by a function that is not learned."""

from __future__ import annotations

import heapq
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn

from moesaic.errors import ConfigError
from moesaic.layer.noise import hash_of
from moesaic.layer.record import Routing, RoutingContext
from moesaic.layer.routers.base import BaseRouterConfig, Need, Router, check_top_k, fill_buffer
from moesaic.layer.routers.parts.inputs import ids_of, linear
from moesaic.layer.routers.scores import ScoreFunction, at, normalize, score, top_k

Table = Literal["random", "balanced", "ngram", "stored"]


class HashConfig(BaseRouterConfig):
    """Fields of hash routing (Hash Layers, arXiv 2106.04426).

    Attributes:
        vocabulary_size: number of token ids.
        top_k: experts for each token (K), all different.
        table: the function of ids. "random": uniform (section 3, random hash), another one in each layer. "balanced":
            ids in falling frequency, each to the experts with the least load so far (section 3, balanced assignment),
            the same in all layers. "ngram": random and uniform in the id and the ones before it (bigram hash for
            `ngram_length` 2). "stored": a table that comes with the weights (DeepSeek-V4), random before.
        seed: of the random functions.
        ngram_length: ids that "ngram" looks at.
        frequencies: for "balanced": path of a JSON file with a list of `vocabulary_size` counts, or `zipf` for
            1 / (id + 1), which is about right for byte-pair vocabularies, whose ids are in the order of merges.
        weights: 1 / K for each pick, or learned "scores" of the experts that the hash names (DeepSeek-V4).
        score_function: how logits become those scores.
        normalize_top_k: divide the K scores by their sum.
        normalization_epsilon: added to that sum.
        scaling_factor: multiplies the weights.
        num_domains: split the experts into this many equal groups; the task of a sequence chooses the group, the hash
            the experts in it (random routed experts of PanGu-Sigma, arXiv 2303.10845). None for one group.
    """

    type: Literal["hash"] = "hash"
    vocabulary_size: PositiveInt
    top_k: PositiveInt = 1
    table: Table = "random"
    seed: int = Field(default=0, ge=0, lt=2**63)
    ngram_length: int = Field(default=2, ge=2)
    frequencies: str | None = None
    weights: Literal["uniform", "scores"] = "uniform"
    score_function: ScoreFunction = "softmax"
    normalize_top_k: bool = False
    normalization_epsilon: float = Field(default=0.0, ge=0)
    scaling_factor: float = 1.0
    num_domains: PositiveInt | None = None

    @model_validator(mode="after")
    def _consistent(self) -> HashConfig:
        if self.table == "balanced" and self.frequencies is None:
            raise ConfigError(
                "frequencies",
                None,
                "is missing, and a balanced table needs counts",
                "give the path of a JSON list of counts, or `zipf`",
            )
        reasons = {
            "frequencies": (self.table != "balanced", "table: balanced"),
            "ngram_length": (self.table != "ngram", "table: ngram"),
            "score_function": (self.weights != "scores", "weights: scores"),
            "normalize_top_k": (self.weights != "scores", "weights: scores"),
            "normalization_epsilon": (not self.normalize_top_k, "normalize_top_k: true"),
        }
        for field, (unread, wanted) in reasons.items():
            value = getattr(self, field)
            if unread and value != type(self).model_fields[field].default:
                raise ConfigError(field, value, f"has no effect without {wanted}", f"set {wanted}, or leave it out")
        return self

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"token_ids"} if self.num_domains is None else {"token_ids", "task"})

    @property
    def unservable(self) -> str | None:
        if self.table != "ngram":
            return None
        return "the hash takes in the ids of earlier tokens, which a cache does not hold"

    def group_size(self, num_experts: int) -> int:
        """Experts that one sequence can reach."""
        return num_experts // (self.num_domains or 1)

    @property
    def unranked(self) -> str | None:
        return "a table of token ids names the experts, and ranks no others"

    def check(self, num_experts: int) -> None:
        if num_experts % (self.num_domains or 1):
            divisors = [n for n in range(1, num_experts + 1) if num_experts % n == 0]
            raise ConfigError(
                "num_domains",
                self.num_domains,
                f"does not divide num_experts ({num_experts})",
                f"choose from {divisors}",
            )
        what = "num_experts" if self.num_domains is None else "num_experts / num_domains"
        check_top_k(self.top_k, self.group_size(num_experts), what)

    def build(self, hidden_size: int, num_experts: int) -> HashRouter:
        self.check(num_experts)
        return HashRouter(self, hidden_size, num_experts)


class HashRouter(Router[HashConfig]):
    """Experts by token id.

    Tensors are named as in transformers' DeepSeek-V4: the parameter `weight` (N, D) for learned weights, and the buffer
    `tid2eid` (V, K), int64, for tables that are not computed from the id. Padding hashes like id 0.

    Deviations: MultiHash, which lets another hash choose each slice of an expert, is left out, and so are the clustered
    and dispersed hashes, which need embeddings of a trained model. With domains, all groups use one function of ids.
    """

    tid2eid: Tensor | None

    def __init__(self, config: HashConfig, hidden_size: int, num_experts: int) -> None:
        super().__init__(config, num_experts, config.top_k)
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size)) if config.weights == "scores" else None
        kept = config.table in ("balanced", "stored")
        table_VK = torch.zeros(config.vocabulary_size, config.top_k, dtype=torch.int64) if kept else None
        self.register_buffer("tid2eid", table_VK)
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02) -> None:
        if self.weight is not None:
            nn.init.normal_(self.weight, std=std)
        table_VK = self.tid2eid
        if table_VK is None or table_VK.is_meta or getattr(table_VK, "_is_hf_initialized", False):
            return
        if self.config.table == "balanced":
            fill_buffer(table_VK, self._balanced(read_frequencies(self.config)))
        else:
            fill_buffer(table_VK, self._random(torch.arange(len(table_VK), device=table_VK.device)))

    def set_frequencies(self, counts_V: Tensor | Sequence[float]) -> None:
        """Make the balanced table for these counts of the token ids.

        Raises:
            ConfigError: if the table is not a balanced one, or there is not one finite count >= 0 for each id.
        """
        if self.tid2eid is None or self.config.table != "balanced":
            raise ConfigError("table", self.config.table, "takes no frequencies", "set table: balanced")
        values = counts_V.tolist() if isinstance(counts_V, Tensor) else list(counts_V)
        with torch.no_grad():
            self.tid2eid.copy_(self._balanced(_checked(values, self.config.vocabulary_size, "counts_V")))

    def forward(self, x_TD: Tensor, context: RoutingContext | None = None) -> Routing:
        config = self.config
        index_TK = self._experts(context)
        if config.num_domains is not None and context is not None:
            task_B = ids_of(context, "task", config.num_domains, field="num_domains")
            offset_B1 = (task_B * config.group_size(self.num_experts)).unsqueeze(-1)
            index_TK = (index_TK.view(context.batch_size, -1) + offset_B1).view(index_TK.shape)
        picked_TN = torch.zeros(len(x_TD), self.num_experts, dtype=self.precision(x_TD), device=x_TD.device)
        picked_TN = picked_TN.scatter(-1, index_TK, 1.0)
        if self.weight is None:
            weight_TK = torch.full_like(index_TK, 1 / config.top_k, dtype=picked_TN.dtype)
            logits_TN, scores_TN = torch.zeros_like(picked_TN), picked_TN
        else:
            logits_TN = linear(x_TD, self.weight)
            scores_TN = score(logits_TN, config.score_function)
            weight_TK = scores_TN.gather(-1, index_TK)
            if config.normalize_top_k:
                weight_TK = normalize(weight_TK, epsilon=config.normalization_epsilon)
        return Routing(
            index_TK=index_TK,
            weight_TK=weight_TK * config.scaling_factor,
            logits_TN=logits_TN,
            scores_TN=scores_TN,
            selection_TN=picked_TN,
        )

    def _weigh(self, routing: Routing, index_TK: Tensor, kept_TK: Tensor) -> Tensor:
        config = self.config
        if self.weight is None:
            return kept_TK.to(routing.scores_TN.dtype) * (1 / config.top_k) * config.scaling_factor
        weight_TK = at(routing.scores_TN, index_TK, kept_TK)
        if config.normalize_top_k:
            weight_TK = normalize(weight_TK, epsilon=config.normalization_epsilon)
        return weight_TK * config.scaling_factor

    def _experts(self, context: RoutingContext | None) -> Tensor:
        """K experts of each token, in its group if there are groups."""
        ids_T = ids_of(context, "token_ids", self.config.vocabulary_size, field="vocabulary_size")
        if self.tid2eid is not None:
            return self.tid2eid[ids_T]
        earlier = []
        if self.config.table == "ngram" and context is not None:
            earlier = [_before(ids_T, distance, context) for distance in range(1, self.config.ngram_length)]
        return self._random(ids_T, *earlier)

    def _random(self, *ids: Tensor) -> Tensor:
        """The K experts whose hashes with the ids are the largest: K different ones, each set equally likely."""
        device = ids[0].device
        seed, layer = (torch.full((), value, device=device) for value in (self.config.seed, self.layer))
        expert_N = torch.arange(self.config.group_size(self.num_experts), device=device)
        key_TN = hash_of(seed, layer, *(part.unsqueeze(-1) for part in ids), expert_N)
        return top_k(key_TN, self.top_k, stable=True)

    def _balanced(self, frequencies: Sequence[float]) -> Tensor:
        return balanced_table(frequencies, self.config.group_size(self.num_experts), self.top_k)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, table={self.config.table}"


def balanced_table(frequencies: Sequence[float], num_experts: int, top_k: int = 1) -> Tensor:
    """A table (V, K) of experts that spreads the frequencies of V ids evenly (arXiv 2106.04426, section 3).

    Ids in falling frequency, the lower id first among equals, each go to the K experts with the least load so far;
    among experts of equal load to those with fewer ids, then to the lower index.
    """
    table = [[0] * top_k for _ in frequencies]
    heap = [(0.0, 0, expert) for expert in range(num_experts)]
    for token in sorted(range(len(frequencies)), key=lambda token: -frequencies[token]):
        lightest = [heapq.heappop(heap) for _ in range(top_k)]
        table[token] = [expert for _, _, expert in lightest]
        for load, ids, expert in lightest:
            heapq.heappush(heap, (load + frequencies[token], ids + 1, expert))
    return torch.tensor(table, dtype=torch.int64).view(len(frequencies), top_k)


def _before(ids_T: Tensor, distance: int, context: RoutingContext) -> Tensor:
    """The id so many tokens before each token of its sequence; -1 before its start and where padding is."""
    batch, length = context.batch_size, len(ids_T) // context.batch_size

    def shift(values_T: Tensor) -> Tensor:
        return F.pad(values_T.view(batch, -1), (distance, 0))[:, :length].reshape(-1)

    known_T = shift(torch.ones_like(ids_T) if context.mask_T is None else context.mask_T.long()).bool()
    if context.position_T is not None:  # positions start again where packing puts another document into the sequence
        known_T = known_T & (shift(context.position_T) + distance == context.position_T)
    return shift(ids_T).masked_fill(~known_T, -1)


def read_frequencies(config: HashConfig) -> list[float]:
    """The counts of a balanced table, one for each id.

    Raises:
        ConfigError: if they are to come from a file that can't be read or holds something else.
    """
    size, source = config.vocabulary_size, str(config.frequencies)
    if source == "zipf":
        return [1 / (token + 1) for token in range(size)]
    try:
        values = json.loads(Path(source).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            "moe.router.frequencies", source, f"can't be read ({error.strerror})", "give a JSON file"
        ) from None
    except ValueError:
        raise ConfigError(
            "moe.router.frequencies", source, "is not JSON", "write a list of counts, one for each id"
        ) from None
    return _checked(values, size, "moe.router.frequencies")


def _checked(values: Any, size: int, field: str) -> list[float]:
    """A count for each id, or the error that says what is wrong."""
    if not isinstance(values, list) or len(values) != size:
        found = f"{len(values)} values" if isinstance(values, list) else f"a {type(values).__name__}"
        raise ConfigError(field, found, f"is not a list of vocabulary_size ({size}) counts", "give one for each id")
    for token, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
            raise ConfigError(f"{field}[{token}]", value, "is not a count", "give a finite number of at least 0")
    return values
