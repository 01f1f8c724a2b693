"""Overridden models, ours and stock ones: what a row gets does not depend on its company, and nothing is left behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.parity.stock_models import stock_model, token_ids
from tests.trace.models import LAYERS, tiny_model
from torch import Tensor, nn
from transformers import PreTrainedModel

import moesaic
from moesaic.errors import ConfigError, UnsupportedModel, UnsupportedOverride
from moesaic.hf.router_presets import ROUTER_PRESETS
from moesaic.infer.decode import OverrideSpec, ReplayedTrace

STOCK = ("mixtral", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3", "gpt_oss")
MODELS = ("ours", *STOCK)
OVERRIDES = ("k=4", "rank=2", "random=2:7", "experts=1,3", "without=2", "dynamic=0.4", "null=0.3+temperature=2")
close: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}


def model_of(name: str) -> PreTrainedModel:
    """In evaluation mode, with routers that are sure of what they pick."""
    if name != "ours":
        return stock_model(name)
    model = tiny_model()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "norm" not in parameter_name:
                parameter.normal_(std=0.3, generator=generator)
    return model


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def ids(batch: int = 2, length: int = 10) -> Tensor:
    return token_ids(batch, length) % 50


def greedy(model: Any, batch: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
    mask = torch.ones_like(batch) if mask is None else mask
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **options}
    return model.generate(batch, attention_mask=mask, **options)[:, batch.shape[1] :]


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_padded_batch_of_overrides_is_each_prompt_alone(name: str) -> None:
    model = model_of(name)
    prompts = [ids()[row, row:] for row in (0, 1)] * 4
    rows = [None, *OVERRIDES]
    batch = torch.zeros(len(rows), 10, dtype=torch.int64)
    mask = torch.zeros_like(batch)
    for row, prompt in enumerate(prompts):
        batch[row, -len(prompt) :], mask[row, -len(prompt) :] = prompt, 1
    before = hooks(model)
    with moesaic.override_routing(model, rows=rows):
        together = greedy(model, batch, mask)
        without_cache = greedy(model, batch, mask, use_cache=False)
        logits = model(batch, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).logits
    assert torch.equal(together, without_cache)
    for row, (prompt, override) in enumerate(zip(prompts, rows, strict=True)):
        with moesaic.override_routing(model, () if override is None else override):
            torch.testing.assert_close(logits[row, -len(prompt) :], model(prompt.unsqueeze(0)).logits[0], **close)
            if row % 3 == 0:
                assert torch.equal(together[row], greedy(model, prompt.unsqueeze(0))[0])
    assert hooks(model) == before
    assert len({tuple(found.flatten().tolist()) for found in logits[::2, -1]}) == len(rows) // 2


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_own_number_of_picks_changes_no_bit(name: str) -> None:
    model = model_of(name)
    expected = model(ids()).logits
    text = model.config.get_text_config()
    k = model.config.spec.router.top_k if name == "ours" else text.num_experts_per_tok
    with moesaic.override_routing(model, f"k={k}"):
        assert torch.equal(model(ids()).logits, expected)
        assert torch.equal(greedy(model, ids()), greedy(model, ids()))
    with moesaic.override_routing(model, "k=1"):
        assert not torch.allclose(model(ids()).logits, expected, atol=1e-3)
        # An inner override starts from what the outer one made.
        with moesaic.override_routing(model, f"k={k}"):
            torch.testing.assert_close(model(ids()).logits, expected, **close)


@pytest.mark.parametrize("name", ["ours", "mixtral"])
@torch.no_grad()
def test_what_a_family_computes_with_another_k_is_what_its_config_would(name: str) -> None:
    model = model_of(name)
    with moesaic.override_routing(model, "k=3"):
        found = model(ids()).logits
    if name == "ours":
        for block in model.moe_blocks().values():  # type: ignore[operator]
            block.gate.config = block.gate.config.model_copy(update={"top_k": 3})
    else:
        for module in model.modules():
            if hasattr(module, "top_k"):
                module.top_k = 3  # type: ignore[assignment]
    torch.testing.assert_close(found, model(ids()).logits, **close)


@pytest.mark.parametrize("name", ["ours", "qwen3_moe"])
@torch.no_grad()
def test_beams_and_sequences_of_a_prompt_have_its_override(name: str) -> None:
    model = model_of(name)
    options: dict[str, Any] = {"num_beams": 3, "num_return_sequences": 2}
    with moesaic.override_routing(model, rows=["rank=2", None]):
        together = greedy(model, ids(), **options)
    with moesaic.override_routing(model, "rank=2"):
        assert torch.equal(together[:2], greedy(model, ids()[:1], **options))
    assert torch.equal(together[2:], greedy(model, ids()[1:], **options))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["ours", "deepseek_v3"])
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
def test_recomputed_layers_have_the_override_of_their_forward_pass(name: str, reentrant: bool) -> None:
    model = model_of(name).train()

    def gradients(loss: Tensor) -> dict[str, Tensor]:
        model.zero_grad()
        loss.backward()
        return {key: value.grad.clone() for key, value in model.named_parameters() if value.grad is not None}

    def loss() -> Tensor:
        with moesaic.override_routing(model, rows=["random=2+temperature=0.7", "dynamic=0.4"]):
            return model(ids(), labels=ids(), use_cache=False).loss

    expected = gradients(loss())
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    torch.testing.assert_close(gradients(loss()), expected, **close)


@pytest.mark.parametrize("name", ["ours", "mixtral", "qwen3_moe"])
@torch.no_grad()
def test_fast_decoding_honours_overrides(name: str) -> None:
    model = model_of(name)
    for override in ("rank=2", "k=3", "dynamic=0.5"):
        with moesaic.override_routing(model, override):
            expected = greedy(model, ids())
            with moesaic.fast_decoding(model):
                assert torch.equal(greedy(model, ids()), expected)
        with moesaic.fast_decoding(model), moesaic.override_routing(model, override):
            assert torch.equal(greedy(model, ids()), expected)


@torch.no_grad()
def test_traces_record_what_was_overridden_and_can_be_replayed_by_row() -> None:
    model = model_of("ours")
    with moesaic.override_routing(model, "rank=2"), moesaic.record(model) as trace:
        second = model(ids()).logits
    ranked = [rows.choice_TK for rows in trace.rows()]
    assert all(choice_TK.shape[1] == 1 for choice_TK in ranked)
    plain = model(ids()).logits
    replayed = ReplayedTrace(replay=trace, documents=(1,))
    with moesaic.override_routing(model, rows=[None, replayed]):
        found = model(ids()).logits
    torch.testing.assert_close(found[0], plain[0], **close)
    torch.testing.assert_close(found[1], second[1], **close)
    with moesaic.override_routing(model, [replayed, "scale=2"]), moesaic.record(model) as again:
        model(ids()[1:])
    first = next(iter(again.rows()))
    torch.testing.assert_close(first.weight_TK, 2 * next(iter(trace.rows())).weight_TK[10:])


@torch.no_grad()
@pytest.mark.parametrize("name", ["ours", "mixtral"])
def test_a_recording_that_began_before_hears_what_was_overridden(name: str) -> None:
    model = model_of(name)
    with moesaic.record(model) as outer, moesaic.override_routing(model, "rank=2"), moesaic.record(model) as inner:
        model(ids())
    for before, after in zip(outer.rows(), inner.rows(), strict=True):
        assert torch.equal(before.choice_TK, after.choice_TK)
        assert torch.equal(before.weight_TK, after.weight_TK)


@torch.no_grad()
def test_layers_without_the_override_keep_their_routing() -> None:
    model = model_of("ours")
    with moesaic.record(model) as plain:
        model(ids())
    with moesaic.override_routing(model, f"rank=2@{LAYERS[1]}"), moesaic.record(model) as trace:
        model(ids())
    assert torch.equal(plain.layers[LAYERS[0]].index_TK, trace.layers[LAYERS[0]].index_TK)
    assert trace.layers[LAYERS[1]].index_TK.shape[1] == 1


# --- Refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rank=7", r"rank = 7 is more than the 6 experts"),
        ("rank=2@0", r"rank\.layers = 0 is a layer without a router; routers are in \[1, 2\]"),
        ("experts=6", "experts = 6 is no expert of layer 1"),
        ("k=2+rank=1", "chooses the experts of layer 1, and so does k"),
        ("rank=0", r"override\.parts\.0\.rank"),
        ("beta=3", "has a part that is none: 'beta=3'"),
        ("k=two", "has a part that can't be read"),
        ("k=2@3-1", "has a part that can't be read"),
        ({"type": "rang", "rank": [2]}, "is not one of the choices"),
        (3, "says no override"),
    ],
)
def test_malformed_overrides(override: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message), moesaic.override_routing(tiny_model(), override):
        raise AssertionError("nothing runs")


def test_further_refusals() -> None:
    with pytest.raises(UnsupportedModel, match="no MoE layer"), moesaic.override_routing(nn.Linear(2, 2), "k=1"):
        pass
    model = tiny_model(capacity={"factor": 2.0, "eval_factor": 2.0})
    with pytest.raises(UnsupportedOverride, match="layer 1 has a capacity"):
        moesaic.override_routing(model, rows=["k=1", None]).__enter__()
    with moesaic.override_routing(model, "k=1"):
        model(ids())
    with pytest.raises(ConfigError, match="give one of the two"):
        moesaic.override_routing(model, "k=1", rows=["k=1"]).__enter__()
    model = tiny_model()
    with (
        pytest.raises(ConfigError, match="do not fit a batch of 2 rows"),
        moesaic.override_routing(model, rows=[None, "k=1", None]),
    ):
        model(ids())
    before = model(ids()).logits
    with pytest.raises(ConfigError, match="batch of 1 rows"), moesaic.override_routing(model, rows=["k=1"] * 2):
        model(ids()[:1])
    assert torch.equal(model(ids()).logits, before)


def test_stock_families_whose_picks_cannot_be_replaced() -> None:
    from tests.trace.stock_families import tiny_model as stock_family

    model = stock_family(ROUTER_PRESETS["AfmoeTokenChoiceRouter"])
    with pytest.raises(UnsupportedOverride, match="does not return logits, weights"):
        moesaic.override_routing(model, "k=1").__enter__()


# --- As data ----------------------------------------------------------------------------------------------------------


def test_texts_objects_and_yaml_say_the_same(tmp_path: Any) -> None:
    spec = OverrideSpec.of("k=4@1-2,4+without=3,7+null=0.1+random=2:9@0")
    assert spec.to_dict()["parts"] == [
        {"layers": [1, 2, 4], "type": "k", "k": 4},
        {"layers": None, "type": "without", "without": [3, 7]},
        {"layers": None, "type": "null", "null": 0.1, "weights": "router"},
        {"layers": [0], "type": "random", "random": 2, "seed": 9},
    ]
    path = tmp_path / "override.yaml"
    path.write_text(spec.to_yaml())
    assert OverrideSpec.of(path) == OverrideSpec.of(str(path)) == OverrideSpec.of(spec.to_dict()) == spec
    assert (
        OverrideSpec.of(
            ["k=4@1-2,4", spec.parts[1], spec.parts[2], {"type": "random", "random": 2, "seed": 9, "layers": [0]}]
        )
        == spec
    )
    assert OverrideSpec.of(()).parts == OverrideSpec.of({}).parts == ()
