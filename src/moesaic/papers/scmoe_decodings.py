"""The decodings that the SCMoE reproduction compares, and the settings that each is tried with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedModel

from moesaic.infer.consistency import Generate
from moesaic.infer.decode.decodings import (
    ContrastiveDecoding,
    ContrastiveSearch,
    DecodingStrategy,
    EarlyExitContrast,
    SelfContrast,
)
from moesaic.papers.scmoe_options import MeasureOptions, Routed

GREEDY, ENSEMBLE, DYNAMIC, SEARCH, DOLA, AMATEUR, CONTRAST, DEFAULT, STRONGER = (
    "greedy",
    "ensemble",
    "dynamic",
    "contrastive search",
    "DoLa",
    "amateur",
    "self-contrast",
    "fixed self-contrast",
    "stronger self-contrast",
)

FIXED = (GREEDY, DEFAULT)
"""Methods of one setting, for which there is nothing to choose."""

TITLES = {
    GREEDY: "greedy, trained number of experts",
    ENSEMBLE: "greedy, another number of experts",
    DYNAMIC: "dynamic routing",
    SEARCH: "contrastive search",
    DOLA: "DoLa",
    AMATEUR: "contrastive decoding with an amateur",
    CONTRAST: "self-contrast",
    DEFAULT: "self-contrast, setting fixed before",
    STRONGER: "self-contrast with a stronger strong pass",
}


_LAYERS: tuple[Literal["low", "high"], ...] = ("low", "high")


@dataclass(frozen=True)
class Setting:
    """One decoding with its settings.

    Attributes:
        label: of the settings, for a reader.
        override: routing of every pass; none is the model's own.
        strategy: how tokens are chosen; None for the likeliest.
    """

    label: str
    override: str = ""
    strategy: DecodingStrategy | None = None

    def generate(self, **options: Any) -> Generate:
        """The decoding, with further fields of `GenerationConfig`."""
        return Generate(custom_generate=self.strategy, **options)


def fixed(routed: Routed, options: MeasureOptions) -> tuple[str, float]:
    """Weak routing and beta that nobody chose on our data: the paper's best rank and the best single beta of its table 7; for
    models with many picks, one expert and the beta that was best on two of four tasks (table 4)."""
    weak = routed.weak(options)
    if weak[0].startswith("k="):
        return weak[0], 0.5
    return "rank=2", 0.3


def settings(
    routed: Routed, options: MeasureOptions, amateur: PreTrainedModel | str | None = None
) -> Mapping[str, tuple[Setting, ...]]:
    """Settings to choose from by method; greedy decoding comes first.

    Args:
        routed: of the model.
        options: of the measurements.
        amateur: the second model or its folder; None leaves contrastive decoding out.
    """

    def contrast(weak: str, beta: float, **more: Any) -> SelfContrast:
        values: dict[str, Any] = {"weak": weak, "alpha": options.alpha, "beta": beta, **more}
        return SelfContrast(**values)

    weak, beta = fixed(routed, options)
    found = {
        GREEDY: (Setting(f"k={routed.picks}"),),
        ENSEMBLE: tuple(Setting(f"k={number}", f"k={number}") for number in routed.numbers(options)),
        DYNAMIC: tuple(Setting(f"threshold {share:g}", f"dynamic={share:g}") for share in options.dynamic),
        SEARCH: tuple(
            Setting(f"penalty {penalty:g}", strategy=ContrastiveSearch(k=options.candidates, penalty=penalty))
            for penalty in options.penalties
        ),
        DOLA: tuple(Setting(f"{layers} layers", strategy=EarlyExitContrast(layers=layers)) for layers in _LAYERS),
        AMATEUR: tuple(
            Setting(
                f"beta {strength:g}", strategy=ContrastiveDecoding(amateur=amateur, alpha=options.alpha, beta=strength)
            )
            for strength in (options.betas if amateur is not None else ())
        ),
        CONTRAST: tuple(
            Setting(f"{routing}, beta {strength:g}", strategy=contrast(routing, strength))
            for routing in routed.weak(options)
            for strength in options.betas
        ),
        DEFAULT: (Setting(f"{weak}, beta {beta:g}", strategy=contrast(weak, beta)),),
        STRONGER: tuple(
            Setting(f"{strong} against {weak}, beta {strength:g}", strategy=contrast(weak, strength, strong=strong))
            for strong in routed.stronger(options)
            for strength in options.betas
        ),
    }
    return {method: grid for method, grid in found.items() if grid}
