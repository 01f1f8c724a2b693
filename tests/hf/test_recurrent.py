"""Models whose routers share a cell over layers: stored once, trained once, decoding, checkpointing, compiling, refusals."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tests.hf.tiny import assert_same_gradients, backbone_config, gradients, token_ids
from torch import nn
from transformers import AutoModelForCausalLM

import moesaic
from moesaic import MoesaicForCausalLM, MoESpec
from moesaic.errors import ConfigError
from moesaic.hf.configuration import MoesaicConfig
from moesaic.trace import account

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
P, N, LAYERS = 8, 4, (1, 2, 4)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make_model(dtype: torch.dtype = torch.float32, **router: Any) -> MoesaicForCausalLM:
    """Five layers, of which the first and the fourth are dense."""
    spec = MoESpec.from_dict(
        {
            "experts": {"num_experts": N, "intermediate_size": 12},
            "router": {"type": "recurrent", "top_k": 2, "state_size": P, **router},
            "layers": {"only": list(LAYERS)},
            "balance": [{"type": "load_balancing", "coefficient": 0.1}],
        },
        where="moe",
    )
    torch.manual_seed(0)
    backbone = backbone_config("llama", num_hidden_layers=5, max_position_embeddings=128)
    model = moesaic.build(backbone, spec).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(std=0.3)
    return model.eval()


def test_the_cell_is_stored_once_and_shared_again_after_loading(tmp_path: Path) -> None:
    model, ids = make_model(shared_projector=True), token_ids()
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = [name for name in file.keys() if "gate.cell" in name or "gate.projector" in name]  # noqa: SIM118
    assert len(names) == 6
    assert all(".layers.1." in name for name in names)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    first, *others = (block.gate for block in loaded.moe_blocks().values())
    for router in others:
        assert router.cell is first.cell
        assert router.projector is first.projector
        assert not any(parameter.is_meta for parameter in router.cell.parameters())
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
        first.cell.bias_hh.add_(0.5)
        changed = loaded(ids, output_routing=True).routing
        before = model(ids, output_routing=True).routing
    assert not torch.allclose(changed.records[4].logits_TN, before.records[4].logits_TN)


def test_a_copied_and_a_moved_model_share_their_own_cell() -> None:
    model = make_model()
    clone = copy.deepcopy(model).double()
    cells = {id(block.gate.cell) for block in clone.moe_blocks().values()}
    assert len(cells) == 1
    assert cells != {id(block.gate.cell) for block in model.moe_blocks().values()}
    assert clone.moe_blocks()[4].gate.cell.weight_hh.dtype == torch.float64


@pytest.mark.parametrize("initialization", ["torch", "normal"])
def test_fresh_models_have_the_initial_values_that_the_config_names(initialization: str) -> None:
    model = moesaic.build(
        backbone_config("llama", initializer_range=0.3),
        {
            "experts": {"num_experts": N, "intermediate_size": 12},
            "router": {"type": "recurrent", "top_k": 2, "state_size": 64, "initialization": initialization},
        },
    )
    first, second, third = (block.gate for block in model.moe_blocks().values())
    for weight, bound in ((first.cell.weight_hh, 1 / 8), (third.projector.weight, 32**-0.5), (second.weight, 1 / 8)):
        if initialization == "torch":
            assert 0.8 * bound < weight.abs().max() <= bound
        else:
            assert weight.std().item() == pytest.approx(0.3, rel=0.15)
    assert not torch.equal(first.projector.weight, third.projector.weight)


@pytest.mark.parametrize("router", [{}, {"cell": "lstm", "residual": 0.5}, {"mode": "learned_start"}], ids=str)
@torch.no_grad()
def test_decoding_with_a_cache_equals_decoding_without_for_64_tokens(router: dict[str, Any]) -> None:
    """The state runs over layers, so a new token starts from none: there is nothing to cache."""
    model, ids = make_model(torch.float64, **router), token_ids(2, 6)
    arguments: dict[str, Any] = {"max_new_tokens": 64, "do_sample": False, "eos_token_id": None}
    arguments |= {"output_logits": True, "return_dict_in_generate": True}
    cached = model.generate(ids, use_cache=True, **arguments)
    uncached = model.generate(ids, use_cache=False, **arguments)
    assert torch.equal(cached.sequences, uncached.sequences)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(uncached.logits), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("reentrant", [False, True], ids=["non_reentrant", "reentrant"])
@pytest.mark.parametrize(
    "router",
    [{}, {"cell": "lstm", "residual": 0.5, "accumulate_residual": True}, {"mode": "detached"}, {"mode": "no_passing"}],
    ids=str,
)
def test_gradients_under_checkpointing_equal_those_without(router: dict[str, Any], reentrant: bool) -> None:
    ids, results = token_ids(), []
    for checkpointed in (False, True):
        model = make_model(torch.float64, **router).train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        output = model(ids, labels=ids, use_cache=False)
        output.loss.backward()
        results.append((output.loss, gradients(model)))
    assert torch.equal(results[0][0], results[1][0])
    assert_same_gradients(results[1][1], results[0][1], rtol=1e-10, atol=1e-12)


def test_the_balance_loss_of_an_upper_layer_reaches_the_projector_of_a_lower_one() -> None:
    """Also when layers are recomputed, where only the state carries that gradient: labels are switched off here."""
    ids = token_ids()
    for reentrant in (None, False, True):
        model = make_model(torch.float64).train()
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        with_balance = model(ids, labels=ids, use_cache=False)
        with_balance.loss.backward()
        found = model.moe_blocks()[1].gate.projector.weight.grad.clone()
        model.zero_grad()
        model.balance = ()
        model(ids, labels=ids, use_cache=False).loss.backward()
        share = found - model.moe_blocks()[1].gate.projector.weight.grad
        assert share.norm() > 1e-3 * found.norm()


def test_the_model_compiles_to_one_graph_with_its_backward() -> None:
    ids, expected = token_ids(), make_model(cell="lstm", residual=0.5).train()
    expected(ids, labels=ids).loss.backward()
    model = make_model(cell="lstm", residual=0.5).train()
    torch.compile(model, fullgraph=True, backend="aot_eager")(ids, labels=ids).loss.backward()
    assert_same_gradients(gradients(model), gradients(expected), rtol=1e-5, atol=1e-6)


def test_frozen_parts_stay_frozen_when_loaded(tmp_path: Path) -> None:
    make_model(freeze_head=True, freeze_cell=True).save_pretrained(tmp_path)
    model, _ = MoesaicForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    for block in model.moe_blocks().values():
        assert not block.gate.weight.requires_grad
        assert not any(parameter.requires_grad for parameter in block.gate.cell.parameters())
        assert block.gate.projector.weight.requires_grad


def test_the_cell_is_counted_once_as_storage_and_in_every_layer_as_work() -> None:
    model, shared = make_model(), make_model(shared_projector=True)
    router, head, cell = account(model).parts["router"].total, N * P + N, 6 * P * P + 6 * P
    assert router == 3 * (32 * P + P + head) + cell
    assert account(shared).parts["router"].total == router - 2 * (32 * P + P)
    work = account(model).matmul_parameters
    assert account(shared).matmul_parameters == work
    plain = make_plain_model()
    assert work - account(plain).matmul_parameters == 3 * (32 * P + 6 * P * P + N * P) - 3 * 32 * N


def make_plain_model() -> nn.Module:
    spec = MoESpec.from_dict(
        {
            "experts": {"num_experts": N, "intermediate_size": 12},
            "router": {"top_k": 2},
            "layers": {"only": list(LAYERS)},
        }
    )
    return moesaic.build(backbone_config("llama", num_hidden_layers=5), spec)


@pytest.mark.parametrize(
    ("router", "refused"),
    [
        ({}, True),
        ({"mode": "detached"}, True),
        ({"mode": "no_passing", "residual": 0.5}, True),
        ({"mode": "no_passing"}, False),
        ({"mode": "learned_start"}, False),
    ],
    ids=str,
)
def test_stages_are_refused_where_a_state_would_have_to_pass(router: dict[str, Any], refused: bool) -> None:
    spec = make_model(**router).config.spec
    config = MoesaicConfig(backbone=backbone_config("llama", num_hidden_layers=5), moe=spec.to_dict())
    config.distributed_config = SimpleNamespace(pp_size=2)
    if not refused:
        MoesaicForCausalLM(config)
        return
    with pytest.raises(ConfigError, match=r"pp_size = 2 cuts a model whose recurrent router hands its state"):
        MoesaicForCausalLM(config)


def test_residual_refuses_layers_that_differ_in_experts() -> None:
    spec = {
        "experts": {"num_experts": N, "intermediate_size": 12},
        "router": {"type": "recurrent", "top_k": 2, "residual": 0.5},
        "layers": {"only": [0, 2], "num_experts": [4, 8]},
    }
    with pytest.raises(ConfigError, match=r"router\.residual = 0\.5 adds logits of layers with 4 and 8 experts"):
        moesaic.build(backbone_config("llama"), spec)
