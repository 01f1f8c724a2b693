"""`account(model)`: parameters in total and in use for a token, FLOPs, and the plan of the layers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, cast

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from moesaic.errors import ConfigError, UnsupportedModel
from moesaic.hf import MoesaicModel
from moesaic.hf.families import Family, family_of
from moesaic.layer import MoEBlock, Router

PARTS = (
    "embeddings",
    "attention",
    "router",
    "routed experts",
    "shared experts",
    "dense FFN",
    "norms",
    "output head",
    "other",
)


def short(number: float) -> str:
    """Three or four digits and a unit: 2_828_650_496 is "2.83B"."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.2f}{unit}"
    return f"{number:g}"


@dataclass(frozen=True)
class Count:
    """Parameters: `total` stored, `active` used for one token."""

    total: int
    active: int


@dataclass(frozen=True)
class LayerPlan:
    """What one decoder layer holds; the MoE fields are empty for a dense layer.

    Attributes:
        layer: index.
        kind: "moe" or "dense".
        parameters: of the whole layer, attention and norms included.
        router: kind of router and the fields in which it differs from that kind's defaults.
        num_experts: N.
        top_k: K.
        expert_width: hidden width F of a routed expert.
        shared_width: total hidden width of the shared experts.
    """

    layer: int
    kind: str
    parameters: Count
    router: str = ""
    num_experts: int = 0
    top_k: int = 0
    expert_width: int = 0
    shared_width: int = 0


@dataclass(frozen=True)
class Accounting:
    """Size and cost of a model. Routed experts are active by the share of them that a token runs when the load is
    balanced (K / N, less with null experts), everything else in full.

    Attributes:
        parts: parameters by part, in the order of `PARTS`, parts without parameters left out. An output head tied to
            the embeddings has none of its own.
        layers: one plan for each decoder layer.
        matmul_parameters: active parameters that a token is multiplied with: no embeddings, norms or biases; the output
            head also when tied.
        attention_width: width of queries and keys plus width of values over all heads, summed over layers.
        context_length: positions attended to, at which tables and `to_dict` state FLOPs.
    """

    parts: dict[str, Count]
    layers: tuple[LayerPlan, ...]
    matmul_parameters: int
    attention_width: int
    context_length: int

    @property
    def total(self) -> int:
        """Parameters stored."""
        return sum(part.total for part in self.parts.values())

    @property
    def active(self) -> int:
        """Parameters used for one token, embeddings included."""
        return sum(part.active for part in self.parts.values())

    def flops_per_token(self, context_length: int | None = None) -> int:
        """Floating-point operations of one token's forward pass; training takes three times as many.

        2 P + 4 L T h, with P the matmul parameters, L layers, T the context length and h the attention width (DeepSeek
        counts the same way: arXiv 2401.06066, tables 1-3). Scores are counted for all T positions, as if no causal mask
        or sliding window spared any; norms, activations and softmax are left out.
        """
        length = self.context_length if context_length is None else context_length
        return 2 * self.matmul_parameters + 2 * length * self.attention_width

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able dict."""
        return {
            "parameters": {"total": self.total, "active": self.active},
            "flops_per_token": self.flops_per_token(),
            "context_length": self.context_length,
            "parts": {name: asdict(part) for name, part in self.parts.items()},
            "layers": [asdict(plan) for plan in self.layers],
        }

    def __rich__(self) -> Group:
        return Group(self._parts_table(), self._layers_table())

    def _parts_table(self) -> Table:
        table = Table(title="Parameters", title_justify="left", show_footer=True, box=SIMPLE_HEAD)
        table.add_column("part", footer="total")
        table.add_column("stored", footer=f"{self.total:,}", justify="right")
        table.add_column("active per token", footer=f"{self.active:,}", justify="right")
        for name, part in self.parts.items():
            table.add_row(name, f"{part.total:,}", f"{part.active:,}")
        flops = self.flops_per_token()
        table.caption = f"{flops / 1e9:,.3f} GFLOPs per token, forward, at {self.context_length:,} positions"
        return table

    def _layers_table(self) -> Table:
        table = Table("layers", "kind", title="Layer plan", title_justify="left", box=SIMPLE_HEAD)
        for name in ("experts", "picks", "expert\nwidth", "shared\nwidth", "stored", "active"):
            table.add_column(name, justify="right", no_wrap=True)
        groups = self.layer_groups()
        for layers, plan in groups:
            sizes = (plan.num_experts, plan.top_k, plan.expert_width, plan.shared_width)
            counts = (plan.parameters.total, plan.parameters.active)
            table.add_row(layers, plan.kind, *(f"{n:,}" if n else "-" for n in sizes), *map(short, counts))
        # Routers differ in many fields: as a column they would squeeze the others.
        table.caption = "\n".join(f"router of {layers}: {plan.router}" for layers, plan in groups if plan.router)
        table.caption_justify = "left"
        return table

    def layer_groups(self) -> list[tuple[str, LayerPlan]]:
        """Runs of equal layers as ("1-27", the plan of the first of them)."""
        runs: list[list[LayerPlan]] = []
        for plan in self.layers:
            if runs and asdict(runs[-1][0]) | {"layer": plan.layer} == asdict(plan):
                runs[-1].append(plan)
            else:
                runs.append([plan])
        return [(f"{run[0].layer}-{run[-1].layer}" if len(run) > 1 else str(run[0].layer), run[0]) for run in runs]


def account(model: nn.Module, *, context_length: int = 2048) -> Accounting:
    """Count a model's parameters and FLOPs by part and by layer, from shapes alone: meta device is enough.

    Args:
        model: a moesaic model, a dense transformers model of a family that can be a backbone, or a module that holds
            one. What lies outside attention, feed-forward, norms and embeddings counts as "other".
        context_length: positions attended to, for FLOPs.

    Raises:
        UnsupportedModel: if the family is not known, or the model holds experts that are not ours.
        ConfigError: if `context_length` is below 1.
    """
    if context_length < 1:
        raise ConfigError("context_length", context_length, "is not a length", "choose 1 or more")
    owner = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if owner is None:
        raise UnsupportedModel(f"{type(model).__name__} holds no transformers model; give one, or a moesaic model")
    decoder = next((module for module in model.modules() if isinstance(module, MoesaicModel)), owner.base_model)
    config = owner.config.get_text_config(decoder=True)
    family = family_of(config)
    base = decoder.backbone if isinstance(decoder, MoesaicModel) else decoder
    layers = cast(nn.ModuleList, getattr(base, family.layers))
    uses = list(_uses(model, _regions(owner, layers, family), _Region("other"), set()))
    parts = {name: _count(use for use in uses if use.part == name) for name in PARTS}
    return Accounting(
        parts={name: count for name, count in parts.items() if count.total},
        layers=tuple(
            _plan(index, getattr(layer, family.feed_forward), _count(use for use in uses if use.layer == index))
            for index, layer in enumerate(layers)
        ),
        matmul_parameters=sum(use.active for use in uses if use.matmul),
        attention_width=len(layers) * _attention_width(config),
        context_length=context_length,
    )


class _Region(NamedTuple):
    """What the parameters below a module belong to; of `experts` parameters in a row, a token uses `picks`."""

    part: str
    layer: int | None = None
    picks: float = 1
    experts: int = 1


@dataclass(frozen=True)
class _Use:
    """One use of a parameter; a tied parameter has several, of which the first is counted as storage."""

    part: str
    layer: int | None
    stored: int
    active: int
    matmul: bool
    first: bool


def _regions(owner: PreTrainedModel, layers: nn.ModuleList, family: Family) -> dict[nn.Module, _Region]:
    """Where each major module of the model belongs."""
    regions: dict[nn.Module, _Region] = {}
    for index, layer in enumerate(layers):
        feed_forward = cast(nn.Module, getattr(layer, family.feed_forward))
        regions[layer] = _Region("other", index)
        regions[getattr(layer, family.attention)] = _Region("attention", index)
        regions[feed_forward] = _Region("dense FFN", index)
        if isinstance(feed_forward, MoEBlock):
            router = feed_forward.gate
            share = 1.0 if feed_forward.depth is None else feed_forward.depth.capacity
            regions[router] = _Region("router", index)
            regions[feed_forward.experts] = _Region("routed experts", index, router.picks * share, router.num_experts)
            for shared in filter(None, (feed_forward.shared_experts, feed_forward.shared_expert_gate)):
                regions[shared] = _Region("shared experts", index, share)
            if feed_forward.depth_gate is not None:
                regions[feed_forward.depth_gate] = _Region("router", index)
        elif hasattr(feed_forward, "experts"):
            raise UnsupportedModel(
                f"layer {index} of {type(owner).__name__} holds experts of transformers, whose router is not ours; "
                "use moesaic.convert(model) first"
            )
    head = owner.get_output_embeddings()
    if head is not None:
        regions[head] = _Region("output head")
    return regions


def _uses(
    module: nn.Module, regions: dict[nn.Module, _Region], region: _Region, seen: set[nn.Parameter]
) -> Iterator[_Use]:
    """The uses of all parameters below `module`, which belongs to `region` unless it has one of its own."""
    region = regions.get(module, region)
    if isinstance(module, nn.Embedding):
        region = region._replace(part="embeddings")
    elif type(module).__name__.lower().endswith("norm"):
        region = region._replace(part="norms")
    for name, parameter in module.named_parameters(recurse=False):
        row = isinstance(module, Router) and name in module.looked_up
        matmul = parameter.ndim - row > 1 and not name.endswith("bias") and region.part not in ("embeddings", "norms")
        used = parameter[0].numel() if row else parameter.numel()
        active = round(used * region.picks / region.experts)
        yield _Use(region.part, region.layer, parameter.numel(), active, matmul, parameter not in seen)
        seen.add(parameter)
    # What a router borrows from another layer's is work here, too.
    borrowed = [getattr(module, name) for name in module.borrowed] if isinstance(module, Router) else []
    for child in (*module.children(), *borrowed):
        yield from _uses(child, regions, region, seen)


def _count(uses: Iterator[_Use]) -> Count:
    first = [use for use in uses if use.first]
    return Count(sum(use.stored for use in first), sum(use.active for use in first))


def _plan(index: int, feed_forward: nn.Module, parameters: Count) -> LayerPlan:
    if not isinstance(feed_forward, MoEBlock):
        return LayerPlan(index, "dense", parameters)
    router, shared = feed_forward.gate, feed_forward.shared_experts
    config = cast(Any, router).config
    fields = config.model_dump(exclude_defaults=True, exclude={"type", "top_k"})
    settings = ", ".join(f"{name}={value}" for name, value in fields.items())
    return LayerPlan(
        index,
        "moe",
        parameters,
        router=f"{config.type} ({settings})" if settings else config.type,
        num_experts=router.num_experts,
        top_k=router.top_k,
        expert_width=cast(int, feed_forward.experts.intermediate_dim),
        shared_width=0 if shared is None else shared.up_proj.out_features,
    )


def _attention_width(config: PreTrainedConfig) -> int:
    """Query-key width plus value width of one layer, over all heads."""
    heads: int = config.num_attention_heads
    if getattr(config, "qk_nope_head_dim", None):
        # Multi-head latent attention; there `head_dim` is only the rotary part.
        return heads * (config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim)
    return 2 * heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
