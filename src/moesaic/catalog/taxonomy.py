"""The mechanisms of the field as a tree, with what moesaic has of each, and where.

The tree is that of A Survey on Mixture of Experts (arXiv 2407.06204), with a branch `decoding` beside it. Entries are data in the folder `taxonomy_data` beside
this file; names of files in them are relative to `src/moesaic`, names of pages to `docs`.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from typing import Any, Literal

from pydantic import Field, PositiveInt, model_validator

from moesaic.catalog.load import did_you_mean
from moesaic.configuration import Config, read_yaml
from moesaic.errors import ConfigError
from moesaic.layer import MoESpec

_DATA = resources.files("moesaic.catalog") / "taxonomy_data"
_FILES = ("gating", "experts", "peft", "schemes", "decoding", "system", "application")

Decision = Literal["implemented", "partly", "configuration", "planned", "missing", "out_of_scope"]

DECISIONS: Mapping[Decision, str] = {
    "implemented": "a part of moesaic of its own",
    "partly": "some of it",
    "configuration": "other parts make it up",
    "planned": "not yet; its room is planned",
    "missing": "it would fit, but is not there",
    "out_of_scope": "not what moesaic is for",
}
"""What the decisions mean."""

_HAVE = frozenset({"implemented", "partly", "configuration"})
# The experts of a fragment that says nothing of them.
_EXPERTS = {"num_experts": 8, "intermediate_size": 32}


class Mechanism(Config):
    """A system or idea, of the survey or from the branch `decoding`.

    Attributes:
        name: unique, as the command line takes it.
        title: its own name.
        path: the branch that it is filed under.
        also: further branches that it belongs to.
        year: of publication.
        arxiv: number of its paper.
        unverified: the number was not seen in a source; check it before you cite it.
        reference: where it was published, if not there.
        line: what it is.
        equations: numbers of `equations`.
        losses: names of `losses`.
        models: records of models that are made of it.
        decision: what moesaic has of it; see `DECISIONS`.
        reason: what is left out, or why.
        moe: fragment of a spec that is it, with small numbers; the experts may be left out.
        causal: whether outputs are independent of later tokens of their sequence: "always", in "evaluation" only, or
            "never". It follows from `moe`, and tests compare.
        files: where it is.
        page: the page that explains it.
    """

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9.-]*$")
    title: str
    path: str
    also: tuple[str, ...] = ()
    year: PositiveInt
    arxiv: str | None = Field(default=None, pattern=r"^\d{4}\.\d{4,5}$")
    unverified: bool = False
    reference: str | None = None
    line: str
    equations: tuple[str, ...] = ()
    losses: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    decision: Decision
    reason: str | None = None
    moe: dict[str, Any] | None = None
    causal: Literal["always", "evaluation", "never"] | None = None
    files: tuple[str, ...] = ()
    page: str | None = None

    @model_validator(mode="after")
    def _complete(self) -> Mechanism:
        if self.have:
            if not self.files or self.page is None:
                raise ConfigError(
                    "files", self.files, f"is empty for {self.decision}", "say where it is, and on which page"
                )
        elif self.files or self.page or self.moe:
            raise ConfigError("files", self.files, f"does not go with {self.decision}", "remove files, page and moe")
        if self.reason is None and self.decision not in ("implemented", "configuration"):
            raise ConfigError("reason", None, f"is required for {self.decision}", "say what is left out, or why")
        if (self.moe is None) != (self.causal is None):
            raise ConfigError("causal", self.causal, "goes with moe", "give both or neither")
        if self.arxiv is None and self.reference is None:
            raise ConfigError("reference", None, "is required without arxiv", "say where it was published")
        return self

    @property
    def have(self) -> bool:
        """Whether moesaic has it, or some of it."""
        return self.decision in _HAVE

    @property
    def complete(self) -> bool:
        """Whether moesaic has all of it that is wanted."""
        return self.have and self.decision != "partly"

    @property
    def spec(self) -> MoESpec | None:
        """`moe` as a spec."""
        if self.moe is None:
            return None
        return MoESpec.from_dict({"experts": _EXPERTS, **self.moe}, where=f"{self.name}.moe")

    @property
    def link(self) -> str | None:
        """Address of its paper."""
        return None if self.arxiv is None else f"https://arxiv.org/abs/{self.arxiv}"


class RoutingLoss(Config):
    """A loss on the routing, or what stands for one.

    Attributes:
        name: as records of models have it.
        number: of the survey's list, L1 to L14.
        formula: E experts, K picks, f_i the share of picks of expert i, P_i its mean score.
        balanced: its value where all experts have the same load.
        weight: typical coefficients, in its own normalisation.
        decision: what moesaic has of it.
        reason: what is otherwise, or why it is not there.
        balance: an entry of `moe.balance` that is it.
        file: where it is, relative to `src/moesaic`.
    """

    name: str
    number: str = Field(pattern=r"^L\d+[hm]?$")
    formula: str
    balanced: str | int
    weight: str
    decision: Literal["implemented", "planned", "missing"]
    reason: str | None = None
    balance: dict[str, Any] | None = None
    file: str | None = None

    @model_validator(mode="after")
    def _complete(self) -> RoutingLoss:
        if (self.file is None) == (self.decision == "implemented"):
            raise ConfigError("file", self.file, f"does not go with {self.decision}", "give it where it is implemented")
        return self


def mechanisms(branch: str | None = None) -> tuple[Mechanism, ...]:
    """All mechanisms in the order of the tree, or those of a branch and its sub-branches.

    Args:
        branch: a path of `branches`, or the end of exactly one of them.

    Raises:
        ConfigError: if there is no such branch.
    """
    found = tuple(
        Mechanism.from_dict({"name": name, "path": path, **values}, where=name)
        for file in _FILES
        for path, entries in _read(file).items()
        for name, values in entries.items()
    )
    order = list(branches())
    found = tuple(sorted(found, key=lambda entry: order.index(entry.path)))
    if branch is None:
        return found
    wanted = find_branch(branch)
    return tuple(entry for entry in found if any(_inside(path, wanted) for path in (entry.path, *entry.also)))


def mechanism(name: str) -> Mechanism:
    """One mechanism.

    Raises:
        ConfigError: if there is none of that name, with the names that come close.
    """
    found = {entry.name: entry for entry in mechanisms()}
    if name not in found:
        hint = did_you_mean(name, found)
        raise ConfigError("mechanism", name, "is not in the taxonomy", f"{hint}`moesaic catalog mechanisms` lists them")
    return found[name]


def branches() -> dict[str, str]:
    """What stands in each branch, by its path, from the root down."""
    return _read("branches")


def find_branch(name: str) -> str:
    """The path of a branch that is given by its path or by the end of it.

    Raises:
        ConfigError: if no branch ends so, or several do.
    """
    known = list(branches())
    wanted = name.strip("/").lower().replace("_", "-")
    if wanted in known:
        return wanted
    ends = [path for path in known if path.endswith(f"/{wanted}")]
    if len(ends) == 1:
        return ends[0]
    if ends:
        raise ConfigError("branch", name, "is the end of several branches", f"choose {' or '.join(ends)}")
    hint = did_you_mean(wanted, {*known, *(path.rsplit("/", 1)[-1] for path in known)})
    raise ConfigError("branch", name, "is not a branch", f"{hint}the branches are {', '.join(known)}")


def losses() -> tuple[RoutingLoss, ...]:
    """Losses on the routing, in the order of the survey's list."""
    return tuple(
        RoutingLoss.from_dict({"name": name, **values}, where=name) for name, values in _read("losses").items()
    )


def equations() -> dict[str, str]:
    """Equations in the notation of plain text, by their numbers."""
    return _read("equations")


def _inside(path: str, branch: str) -> bool:
    return path == branch or path.startswith(f"{branch}/")


def _read(file: str) -> dict[str, Any]:
    with resources.as_file(_DATA / f"{file}.yaml") as path:
        return read_yaml(path)
