"""What a preset and the record of a model say."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from moesaic.catalog.counting import CannotCount, Size, size_of
from moesaic.catalog.shape import Shape
from moesaic.catalog.shrink import shrink
from moesaic.configuration import Config
from moesaic.errors import ConfigError
from moesaic.layer import MoESpec


class ParameterCount(Config):
    """A number of parameters as its authors print it.

    Attributes:
        billions: the number in billions.
        tolerance: largest relative difference from the model built here, which covers rounding of the printed number,
            and what the authors count otherwise than they say; then the notes say so.
        counts: what the authors count: the whole "model", the model "without_input_embedding" or
            "without_embeddings" (neither input embedding nor output head), or the "experts" alone, shared ones
            included.
    """

    billions: PositiveFloat
    tolerance: float = Field(default=0.005, gt=0, lt=1)
    counts: Literal["model", "without_input_embedding", "without_embeddings", "experts"] = "model"


class PublishedParameters(Config):
    """Parameter counts of a release.

    Attributes:
        total: all parameters.
        active: parameters that one token uses: all but the routed experts it does not pick; None if not printed.
    """

    total: ParameterCount
    active: ParameterCount | None = None


class Preset(Config):
    """A published model that can be built, or a tiny one of the same design.

    Attributes:
        name: what `preset` takes.
        title: the model's own name.
        source: where the values come from.
        backbone: fields of the transformers config, with `model_type`; what is not given keeps that class's default.
        moe: the MoE layers. Balance losses are the ones of the original training where those are known and can be
            said, else there are none.
        published: parameter counts to check against; None where none are printed.
        notes: what a reader should know: derived values, what the spec can't say.
        deviations: in what the model built here differs from the original.
    """

    name: str
    title: str
    source: str
    backbone: dict[str, Any]
    moe: MoESpec
    published: PublishedParameters | None = None
    notes: tuple[str, ...] = ()
    deviations: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> Preset:
        for field in ("model_type", "num_hidden_layers"):
            if field not in self.backbone:
                raise ConfigError(f"backbone.{field}", None, "is required", "set it")
        self.moe.layers.indices(self.backbone["num_hidden_layers"])
        return self

    def shrink(self, *, max_experts: int = 16, vocabulary_size: int = 512, context_length: int = 512) -> Preset:
        """A tiny model of the same design, to train on a laptop; see `moesaic.catalog.shrink`."""
        return shrink(self, max_experts=max_experts, vocabulary_size=vocabulary_size, context_length=context_length)


RouterKind = Literal[
    "softmax_topk",
    "topk_softmax",
    "sigmoid_topk",
    "topk_sigmoid",
    "noisy_topk",
    "attention_router",
    "sparsemixer",
    "mlp_topk",
    "soft_dispatch_combine",
]


class RouterFacts(Config):
    """How tokens choose experts, in the words of the survey.

    Attributes:
        kind: "softmax_topk" takes the softmax over all experts and then picks, "topk_softmax" picks and then takes it
            over the picks; the others likewise.
        normalized: whether the weights of a token's picks sum to 1; None if that means nothing.
        details: groups, scales, noise, biases, capacity.
    """

    kind: RouterKind
    normalized: bool | None = None
    details: str | None = None


class PublishedLoss(Config):
    """A loss on the routing in the original training.

    Attributes:
        loss: an entry of the taxonomy's losses.
        coefficient: in the normalisation of its source; None if it is not published.
        details: how it moves.
    """

    loss: str
    coefficient: PositiveFloat | None = None
    details: str | None = None


class Unbuildable(Config):
    """Why a model can't be built here.

    Attributes:
        reason: what is missing, as the end of a sentence that starts with the model's name.
        near: presets that come close.
    """

    reason: str
    near: tuple[str, ...]


Verified = Literal["code", "config", "paper", "survey", "recalled", "ours"]


class ModelRecord(Config):
    """A published model configuration as data, whether it can be built or not.

    Attributes:
        name: what `model` takes; the name of its preset, too, if it has one.
        title: the model's own name.
        year: of publication.
        arxiv: number of its paper.
        architecture: what kind of network it is.
        details: what is unusual about it.
        source: where the values come from.
        verified: which kinds of sources the values were read in; "recalled" are from memory: check them before you
            quote them. "ours" are configurations of this project.
        router: how tokens choose experts.
        losses: losses on the routing in its training.
        published: parameter counts that its authors print.
        shape: what it is counted by; that of the preset where there is one.
        uncountable: why its parameters can't be counted although its shape is known; None if they can.
        buildable: whether there is a preset of this name.
        unbuildable: why there is none.
        notes: what a reader should know.
        deviations: in what the preset differs from the original.
    """

    name: str
    title: str
    year: PositiveInt
    arxiv: str | None = Field(default=None, pattern=r"^\d{4}\.\d{4,5}$")
    architecture: Literal["decoder", "encoder-decoder", "vision encoder"]
    details: str | None = None
    source: str
    verified: tuple[Verified, ...] = Field(min_length=1)
    router: RouterFacts
    losses: tuple[PublishedLoss, ...] = ()
    published: PublishedParameters | None = None
    shape: Shape
    uncountable: str | None = None
    buildable: bool
    unbuildable: Unbuildable | None = None
    notes: tuple[str, ...] = ()
    deviations: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _one_way(self) -> ModelRecord:
        if self.buildable == (self.unbuildable is not None):
            problem = "has a preset beside it" if self.buildable else "is required without a preset"
            raise ConfigError("unbuildable", self.unbuildable, problem, "say why it can't be built, or add a preset")
        return self

    @property
    def picks(self) -> str:
        """Routed picks of routed experts, null and shared experts: "8 of 256 + 1"."""
        shape = self.shape
        counts = sorted(set(shape.experts_per_layer))
        number = str(counts[0]) if len(counts) == 1 else f"{counts[0]}-{counts[-1]}"
        nulls = f" + {shape.num_null} null" if shape.num_null else ""
        shared = f" + {shape.num_shared}" if shape.num_shared else ""
        return f"{'all' if shape.top_k is None else shape.top_k} of {number}{nulls}{shared}"

    @property
    def built(self) -> str:
        """Whether it can be built: "yes", "nearly" with deviations, or "no"."""
        return "no" if not self.buildable else "nearly" if self.deviations else "yes"

    def size(self) -> Size:
        """Parameters recomputed from the shape.

        Raises:
            CannotCount: if they can't be, with the reason.
        """
        if self.architecture != "decoder":
            raise CannotCount(
                f"{self.name}.architecture", self.architecture, "is not covered", "decoders can be counted"
            )
        if self.uncountable is not None:
            raise CannotCount(self.name, self.title, "can't be counted", self.uncountable)
        return size_of(self.shape)
