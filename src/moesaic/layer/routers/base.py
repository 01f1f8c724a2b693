"""What every router is: a pure function of its inputs and parameters that returns a `Routing`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Generic, Literal, TypeVar

import torch
from torch import Tensor, nn

from moesaic.configuration import Config
from moesaic.errors import ConfigError, UnsupportedOverride
from moesaic.layer.load import LayerLoad
from moesaic.layer.record import Routing, RoutingContext

Need = Literal["token_ids", "modality", "task"]
Dependence = Literal["later_tokens", "other_sequences", "random_numbers"]


class BaseRouterConfig(Config, ABC):
    """What the config of every router says of its mechanism, besides its own fields.

    The properties are facts that follow from the fields. Whoever runs a router reads them to refuse what can't work
    before any work is done.
    """

    def depends_on(self, training: bool) -> frozenset[Dependence]:
        """What the routing of a token depends on besides the token itself and earlier ones of its sequence."""
        return frozenset()

    @property
    def unservable(self) -> str | None:
        """Why it can't decode token by token with a cache, or None if it can."""
        found = sorted(self.depends_on(training=False))
        if not found:
            return None
        return f"the routing of a token depends on {' and '.join(found).replace('_', ' ')}"

    @property
    def may_skip(self) -> bool:
        """Whether picks may be no expert."""
        return False

    @property
    def variable_width(self) -> bool:
        """Whether K, the width of the record, depends on the data."""
        return False

    @property
    def needs(self) -> frozenset[Need]:
        """What the context must hold."""
        return frozenset()

    @property
    def carries_state(self) -> bool:
        """Whether a layer's routing depends on the router state of the layers below."""
        return False

    @property
    def provides(self) -> frozenset[str]:
        """Names of its `Routing.auxiliary` losses, which the balance loss `router` adds to the training loss."""
        return frozenset()

    @property
    def has_smooth_load(self) -> bool:
        """Whether the record has `load_TN`, which the loss `load` balances."""
        return False

    @property
    def has_selection_bias(self) -> bool:
        """Whether the router has the buffer `e_score_correction_bias`, which `MoESpec.selection_bias_update` moves."""
        return bool(getattr(self, "selection_bias", False))

    @property
    def runs_all_experts(self) -> bool:
        """Whether every expert runs, or is merged, for every token: then there is no load to balance."""
        return False

    @property
    def refuses_capacity(self) -> str | None:
        """Why experts can't be given a capacity, or None if they can."""
        if self.runs_all_experts:
            return "every expert runs for every token, so that none can be full"
        if self.variable_width:
            return "the number of picks depends on the data, so that a capacity factor has nothing to multiply"
        return None

    @property
    def takes_picks(self) -> bool:
        """Whether an override can give tokens other experts: each token has picks of its own."""
        return True

    @property
    def unranked(self) -> str | None:
        """Why `selection_TN` does not say which experts are second best for a token, or None if it does."""
        return None

    @abstractmethod
    def check(self, num_experts: int) -> None:
        """Check against the number of experts.

        Raises:
            ConfigError: naming the field that does not fit N experts.
        """

    @abstractmethod
    def build(self, hidden_size: int, num_experts: int) -> Router:
        """The router module for inputs of width `hidden_size`."""


def check_top_k(top_k: int, available: int, what: str = "num_experts", *, field: str = "top_k") -> None:
    """Refuse more picks than there is to pick from.

    Raises:
        ConfigError: naming `field`.
    """
    if top_k > available:
        raise ConfigError(field, top_k, f"is larger than {what} ({available})", f"choose 1 to {available}")


ConfigT = TypeVar("ConfigT", bound=BaseRouterConfig)


class Router(nn.Module, ABC, Generic[ConfigT]):
    """Scores N experts for each token and picks K of them.

    `forward` must not change the module: under activation checkpointing it runs twice and must give the same record.
    Random numbers come from `layer.noise`. Routers compute in float32 (float64 for float64 input), also under autocast.

    Attributes:
        config: its fields.
        num_experts: N.
        top_k: K, the width of the record.
        layer: index of the decoder layer; set by the block that owns the router.
        full_precision: names of own buffers that casts leave in float32.
        borrowed: names of submodules that another layer's router owns.
        looked_up: names of own parameters of which a token uses one row, as of an embedding.
    """

    config: ConfigT
    num_experts: int
    top_k: int
    layer: int = 0
    full_precision: tuple[str, ...] = ()
    borrowed: tuple[str, ...] = ()
    looked_up: tuple[str, ...] = ()

    def __init__(self, config: ConfigT, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.config, self.num_experts, self.top_k = config, num_experts, top_k

    @abstractmethod
    def forward(self, x_TD: Tensor, context: RoutingContext | None = None) -> Routing:
        """Route T tokens.

        Args:
            x_TD: hidden states of all sequences, flattened.
            context: tokens and lower layers' records of this forward pass; None when the layer is used on its own.
        """

    def weights_at(self, routing: Routing, choice_TK: Tensor) -> Tensor:
        """Weights that the router's own rule gives to selections, whoever made them.

        Differentiable in the router's parameters, as the weights of `forward` are, which they equal at its selections.

        Args:
            routing: what `forward` returned for these tokens.
            choice_TK: selections in [0, M], int64; M for nothing. K may differ from that of the record.

        Returns:
            (T, K) in the router's precision, 0 for nothing. Null experts have the weight with which they pass a token on.

        Raises:
            UnsupportedOverride: if the rule needs more than scores and selections.
        """
        if not self.says_weights:
            raise UnsupportedOverride(
                f"router {getattr(self.config, 'type', type(self).__name__)} can't say the weights of given picks; give the weights too "
                '(of a trace: weights="trace")'
            )
        kept_TK = choice_TK < routing.num_columns
        # Where a token has nothing, anything stands for a pick: sums of weights are not 0, and no gradient is NaN.
        some_TK = kept_TK | ~kept_TK.any(-1, keepdim=True)
        weight_TK = self._weigh(routing, choice_TK.masked_fill(~kept_TK, 0), some_TK)
        return weight_TK.masked_fill(~kept_TK, 0.0)

    def admitted(self, routing: Routing) -> Tensor:
        """Which columns each token may pick (T, M): all but those that the selection masks.

        Args:
            routing: what `forward` returned for these tokens.
        """
        return routing.selection_TN > float("-inf")

    @property
    def num_columns(self) -> int:
        """M, the columns that it scores: experts and null experts."""
        return self.num_experts + int(getattr(self.config, "num_null", 0))

    @property
    def most_admitted(self) -> int:
        """The most columns that a token may pick from."""
        return self.num_columns

    @property
    def says_weights(self) -> bool:
        """Whether `weights_at` works."""
        return type(self)._weigh is not Router._weigh

    def _weigh(self, routing: Routing, index_TK: Tensor, kept_TK: Tensor) -> Tensor:
        """Weights of columns in [0, M) where `kept_TK`, at least one for each token; 0 elsewhere."""
        raise NotImplementedError

    def reset_parameters(self, std: float = 0.02) -> None:
        """Initialise own parameters and buffers: biases zero, the rest normal with the given standard deviation.

        Only functions of `nn.init` and `fill_buffer` may be used: transformers makes them skip what a checkpoint gave.
        """
        for name, tensor in [*self.named_parameters(recurse=False), *self.named_buffers(recurse=False)]:
            if name.endswith("bias"):
                nn.init.zeros_(tensor)
            else:
                nn.init.normal_(tensor, std=std)

    def freeze(self) -> None:
        """Take out of the training what the config says is frozen: when the router is built, and after loading."""

    def post_step(self, load: LayerLoad, progress: float) -> None:
        """Commit state that changes once an optimiser step; most routers have none.

        Args:
            load: picks of the step over all micro-batches and data-parallel ranks.
            progress: share of the training that is done, 0 to 1.
        """

    def share(self, first: Router) -> None:
        """Take the modules that all layers have in common from the router of the first MoE layer; see `borrow`."""

    def borrow(self, name: str, owner: Router) -> None:
        """Use submodule `name` of another router in place of one's own.

        It is registered with its owner only: there it is stored, moved, counted and trained once.
        """
        delattr(self, name)
        # Past nn.Module's own __setattr__, which would register it.
        object.__setattr__(self, name, getattr(owner, name))
        self.borrowed = (*self.borrowed, name)

    def readings(self) -> dict[str, float]:
        """Numbers that say what the router has become: scalars such as a temperature, and what there is one of for each
        expert, such as a selection bias, by its least and largest value."""
        found = {}
        for name, tensor in [*self.named_parameters(recurse=False), *self.named_buffers(recurse=False)]:
            if tensor.numel() == 1:
                found[name] = float(tensor.detach())
            elif tensor.ndim == 1 and tensor.shape[0] >= self.num_experts and tensor.is_floating_point():
                least, most = tensor.detach().aminmax()
                found[f"{name} least"], found[f"{name} most"] = float(least), float(most)
        return found

    @property
    def picks(self) -> float:
        """Experts that a token runs on average when the load is balanced."""
        return self.top_k

    @staticmethod
    def precision(x_TD: Tensor) -> torch.dtype:
        """The dtype to route in: float32, or float64 where the input is."""
        return torch.promote_types(x_TD.dtype, torch.float32)

    def _apply(self, fn: Any, recurse: bool = True) -> Router:  # type: ignore[override]
        """Moves to another device reach all tensors, casts all but `full_precision`."""
        before = {name: getattr(self, name) for name in self.full_precision}
        super()._apply(fn, recurse)
        for name, tensor in before.items():
            after = getattr(self, name)
            if tensor is not None and after is not None and after.dtype != tensor.dtype:
                setattr(self, name, tensor.to(after.device))
        return self

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, top_k={self.top_k}"


def fill_buffer(buffer: Tensor, values: Tensor) -> None:
    """Copy initial values into a buffer, unless a checkpoint of transformers has filled it."""
    if not getattr(buffer, "_is_hf_initialized", False):
        with torch.no_grad():
            buffer.copy_(values)
