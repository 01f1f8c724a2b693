"""The taxonomy: every leaf of the survey has an entry, and what entries say of moesaic is true."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from moesaic.catalog import models
from moesaic.catalog.taxonomy import (
    Mechanism,
    branches,
    equations,
    find_branch,
    losses,
    mechanism,
    mechanisms,
)
from moesaic.errors import ConfigError
from moesaic.infer.decode.decodings import DecodingStrategy
from moesaic.layer import MoESpec, RouterConfig

ROOT = Path(__file__).parents[2]

# The leaves of the survey's tree (arXiv 2407.06204, figure 2 and sections 4 to 6) by branch, under the names of entries.
SURVEY = {
    "algorithm/gating/dense": "ds-moe evomoe mole-composition loramoe",
    "algorithm/gating/sparse/token-choice": (
        "noisy-top-k gshard switch st-moe m6-t mod-squad stable-moe moduleformer openmoe skywork-moe base dselect-k v-moe "
        "z-code-m3 s-base sentence-level-moe nllb mmoe task-level-moe x-moe uni-perceiver-moe mixtral deepseekmoe jamba "
        "dbrx moa-heads jetmoe yuan2-m32 adamoe scmoe-contrast dynmoe flextron"
    ),
    "algorithm/gating/sparse/non-trainable": "hash-layer thor demix task-moe m2m-100 pangu-sigma",
    "algorithm/gating/sparse/expert-choice": "expert-choice brainformers",
    "algorithm/gating/soft/token-merging": "soft-moe homoe",
    "algorithm/gating/soft/expert-merging": "smear lory mov smola meo",
    "algorithm/experts/network-type/ffn": "emergent-modularity branch-train-mix moefication",
    "algorithm/experts/network-type/attention": "moa-heads jetmoe ds-moe moduleformer",
    "algorithm/experts/network-type/others": "pmoe advmoe chen-theory deepmoe",
    "algorithm/experts/hyper-parameters/count": "meta-moe glam deepspeed-moe",
    "algorithm/experts/hyper-parameters/size": "llama-moe deepseek-v2 qwen1.5-moe peer",
    "algorithm/experts/hyper-parameters/frequency": "moe-llava",
    "algorithm/experts/activation": "relu gelu geglu swiglu",
    "algorithm/experts/shared": "scmoe-shortcut mocle arctic pad-net hypermoe deepseekmoe nllb",
    "algorithm/experts/peft/ffn": "adamix mixda mixlora llava-mole loramoe",
    "algorithm/experts/peft/attention": "moelora-contrastive sira",
    "algorithm/experts/peft/block": "unipelt mola moelora-medical mor1e meteora mocle",
    "algorithm/experts/peft/every-layer": "mole-composition mov",
    "algorithm/schemes/original": "noisy-top-k gshard switch mixtral",
    "algorithm/schemes/dense2sparse": "rmoe-residual dua sparse-upcycling smoe-dropout moebert emoe moefication llama-moe",
    "algorithm/schemes/sparse2dense": "ones moe-pruning ewa he-compress",
    "algorithm/schemes/expert-merging": "branch-train-merge fusion-of-experts branch-train-mix",
    "algorithm/derivatives": "lifelong-moe mixture-of-tokens mixture-of-depths widenet sut smop",
    "system/computation": (
        "fastmoe tutel hetumoe deepspeed-moe fastermoe flexmoe smartmoe deepspeed-ted megablocks scattermoe pit se-moe"
    ),
    "system/communication": (
        "deepspeed-moe hetumoe schemoe fastermoe ta-moe se-moe exflow tutel pipemoe mpipemoe lancet fused-collectives "
        "scmoe-shortcut arctic"
    ),
    "system/storage": "se-moe pre-gated-moe edgemoe mpipemoe",
    "application/nlp": (
        "noisy-top-k gshard switch meta-moe glam mixtral nllb deepspeed-moe st-moe deepseekmoe mogu openmoe"
    ),
    "application/cv": "v-moe swin-moe advmoe pmoe",
    "application/recsys": "mmoe ple adamct m3oe",
    "application/multimodal": "limoe shen pace mocle moe-llava uni-moe mm1 llava-mole",
}

# What models do when they decode, which the survey's tree has no branch for.
DECODING = {
    "decoding/routing": "routing-override ensemble-routing dynamic-routing",
    "decoding/contrast": "scmoe-contrast contrastive-decoding dola contrastive-search",
    "decoding/samples": "self-consistency best-of-n",
}

# Names that two systems share, which must not become one entry.
COLLISIONS = [
    ("moa-heads", "2210.05144"),
    ("scmoe-shortcut", "2404.05019"),
    ("scmoe-contrast", "2405.14507"),
    ("mole-composition", "2404.13628"),
    ("llava-mole", "2401.16160"),
    ("moelora-contrastive", "2402.12851"),
    ("moelora-medical", "2310.18339"),
    ("rmoe-residual", "2204.09636"),
    ("se-moe", "2205.10034"),
    ("sentence-level-moe", "2110.03742"),
    ("task-moe", "2110.03742"),
    ("task-level-moe", "2205.12701"),
]


@pytest.mark.parametrize("branch", SURVEY)
def test_every_leaf_of_the_survey_has_an_entry(branch: str) -> None:
    found = {entry.name for entry in mechanisms(branch)}
    assert set(SURVEY[branch].split()) - found == set()


@pytest.mark.parametrize("branch", DECODING)
def test_every_leaf_of_decoding_is_what_there_is(branch: str) -> None:
    assert {entry.name for entry in mechanisms(branch)} == set(DECODING[branch].split())


def test_every_decoding_of_the_library_is_in_the_tree() -> None:
    files = {file for entry in mechanisms("decoding") for file in entry.files}
    room = "moesaic.infer.decode.decodings."
    modules = {kind.__module__ for kind in DecodingStrategy.__subclasses__() if kind.__module__.startswith(room)}
    assert len(modules) >= 4
    assert {f"{module.replace('.', '/')}.py".removeprefix("moesaic/") for module in modules} <= files


def test_every_branch_has_a_leaf_and_every_leaf_a_branch() -> None:
    known = branches()
    leaves = [path for path in known if not any(other.startswith(f"{path}/") for other in known)]
    assert set(leaves) == {*SURVEY, *DECODING}
    for entry in mechanisms():
        assert {entry.path, *entry.also} <= set(leaves), entry.name


def test_names_are_unique() -> None:
    names = [entry.name for entry in mechanisms()]
    assert len(names) == len(set(names)) >= 130


@pytest.mark.parametrize(("name", "arxiv"), COLLISIONS)
def test_systems_of_one_name_are_kept_apart(name: str, arxiv: str) -> None:
    assert mechanism(name).arxiv == arxiv


def test_numbers_that_no_source_showed_are_marked() -> None:
    marked = {entry.arxiv for entry in mechanisms() if entry.unverified}
    assert {"2404.13628", "2406.13233", "1806.01531", "2305.12281", "2310.15961", "2205.08776"} <= marked
    assert "2401.06066" not in marked


@pytest.mark.parametrize("entry", [entry for entry in mechanisms() if entry.have], ids=lambda entry: entry.name)
def test_files_and_pages_exist(entry: Mechanism) -> None:
    for file in entry.files:
        assert (ROOT / "src" / "moesaic" / file).exists(), file
    assert (ROOT / "docs" / str(entry.page)).is_file()


@pytest.mark.parametrize("entry", [entry for entry in mechanisms() if entry.moe], ids=lambda entry: entry.name)
def test_fragments_are_valid_and_as_causal_as_they_say(entry: Mechanism) -> None:
    spec = entry.spec
    assert spec is not None
    training, evaluation = ("later_tokens" in spec.depends_on(mode) for mode in (True, False))
    assert entry.causal == ("never" if evaluation else "evaluation" if training else "always")


def test_every_router_is_in_the_tree_but_those_that_the_survey_lacks() -> None:
    known = {config.model_fields["type"].default for config in get_args(get_args(RouterConfig)[0])}
    shown = {entry.spec.router.type for entry in mechanisms() if entry.spec is not None}
    assert known - shown == {"dense", "modality", "random_skip", "recurrent"}


def test_what_looks_at_later_tokens_is_what_the_survey_names() -> None:
    never = {entry.name for entry in mechanisms() if entry.causal == "never"}
    assert never == {
        "expert-choice",
        "brainformers",
        "soft-moe",
        "v-moe",
        "sentence-level-moe",
        "smear",
        "meo",
        "lory",
        "mixture-of-depths",
    }
    assert {entry.name for entry in mechanisms() if entry.causal == "evaluation"} >= {"base", "s-base"}


def test_entries_refer_to_what_there_is() -> None:
    known = {"equations": set(equations()), "losses": {loss.name for loss in losses()}}
    known["models"] = {record.name for record in models()}
    for entry in mechanisms():
        for field, names in known.items():
            assert set(getattr(entry, field)) <= names, (entry.name, field)


def test_losses_of_models_are_in_the_taxonomy() -> None:
    names = {loss.name for loss in losses()}
    for record in models():
        assert {loss.loss for loss in record.losses} <= names, record.name


def test_losses_of_the_survey_are_all_there_and_valid() -> None:
    found = losses()
    assert {loss.number.rstrip("hm") for loss in found} == {f"L{number}" for number in range(1, 15)}
    for loss in found:
        if loss.file is not None:
            assert (ROOT / "src" / "moesaic" / loss.file).is_file()
        if loss.balance is not None:
            router = {"type": "noisy_top_k", "top_k": 2}
            experts = {"num_experts": 8, "intermediate_size": 8}
            MoESpec.from_dict({"experts": experts, "router": router, "balance": [loss.balance]})


def test_all_equations_are_used() -> None:
    used = {number for entry in mechanisms() for number in entry.equations}
    assert used == set(equations()) == {f"E{number}" for number in range(1, 44)}


def test_branches_can_be_named_by_their_ends() -> None:
    assert find_branch("expert-choice") == "algorithm/gating/sparse/expert-choice"
    assert find_branch("gating/dense") == "algorithm/gating/dense"
    with pytest.raises(ConfigError, match=r"is the end of several branches; choose .*network-type/ffn or .*peft/ffn"):
        find_branch("ffn")
    with pytest.raises(ConfigError, match=r"did you mean 'application'.*the branches are algorithm, "):
        find_branch("applications")


def test_a_branch_holds_its_sub_branches() -> None:
    inside = {entry.name for entry in mechanisms("algorithm/gating")}
    assert {"evomoe", "switch", "hash-layer", "soft-moe", "mixture-of-tokens"} <= inside
    assert "megablocks" not in inside


def test_unknown_mechanism_lists_close_ones() -> None:
    with pytest.raises(ConfigError, match="did you mean 'skywork-moe'"):
        mechanism("skywork")


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"files": []}, "some.files"),
        ({"decision": "planned", "reason": "later"}, "some.files"),
        ({"decision": "partly", "reason": None}, "some.reason"),
        ({"causal": None}, "some.causal"),
        ({"arxiv": None}, "some.reference"),
    ],
)
def test_incomplete_entries_are_refused_by_field(change: dict, field: str) -> None:
    valid = mechanism("x-moe").to_dict()
    with pytest.raises(ConfigError) as caught:
        Mechanism.from_dict({**valid, **change}, where="some")
    assert caught.value.field == field
