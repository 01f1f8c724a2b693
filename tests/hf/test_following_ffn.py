"""Shared experts placed "after": a feed-forward network with its own norm and residual behind the decoder layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.hf.test_generation import GREEDY, greedy
from tests.hf.tiny import assert_same_gradients, copy_of, gradients, tiny_model, token_ids
from torch import Tensor, nn

import moesaic
from moesaic import MoesaicForCausalLM, MoESpec
from moesaic.errors import ConfigError, UnsupportedExport
from moesaic.layer import MoEBlock
from moesaic.layer.kernels.native import decode
from moesaic.papers.interventions import without_shared_experts
from moesaic.trace import account

AFTER: dict[str, Any] = {"num_experts": 1, "intermediate_size": 20, "placement": "after"}


def following(model_type: str = "llama", **spec: Any) -> MoesaicForCausalLM:
    return tiny_model(model_type, shared_experts=AFTER, **spec)


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gpt2", "gpt_neox", "phi3"])
def test_the_layer_is_what_the_formula_says(model_type: str) -> None:
    """y = h + MoE(norm_a(h)), then y + FFN(norm_b(y)), from the input h of the layer's second half."""
    model, ids = following(model_type).double(), token_ids()
    layers = next(module for module in model.model.backbone.children() if isinstance(module, nn.ModuleList))
    for index, block in model.moe_blocks().items():
        seen: dict[str, Tensor] = {}

        def keep_inner(module: nn.Module, args: tuple, output: Any, seen: dict = seen) -> None:
            seen["y"] = output[0] if isinstance(output, tuple) else output

        def keep_outer(module: nn.Module, args: tuple, output: Any, seen: dict = seen) -> None:
            seen["z"] = output[0] if isinstance(output, tuple) else output

        # Before and behind the hook of the layer, which is the first.
        handles = [
            layers[index].register_forward_hook(keep_inner, prepend=True),
            layers[index].register_forward_hook(keep_outer),
        ]
        model(ids)
        for handle in handles:
            handle.remove()
        network, norm = block.shared_experts, block.shared_norm
        assert network is not None
        assert norm is not None
        torch.testing.assert_close(seen["z"], seen["y"] + network(norm(seen["y"])), rtol=1e-12, atol=1e-12)
        assert not torch.allclose(seen["z"], seen["y"], atol=1e-3)


def test_without_it_the_block_is_that_of_the_routed_experts_alone() -> None:
    model, ids = following(), token_ids()
    alone = tiny_model()
    state = {name: tensor for name, tensor in model.state_dict().items() if ".shared_" not in name}
    alone.load_state_dict(state)
    assert not torch.allclose(model(ids).logits, alone(ids).logits, atol=1e-2)
    with without_shared_experts(model):
        torch.testing.assert_close(model(ids).logits, alone(ids).logits, rtol=1e-6, atol=1e-6)


def test_its_norm_is_of_the_family_and_separate() -> None:
    for model_type, name in (("llama", "LlamaRMSNorm"), ("gpt2", "LayerNorm")):
        model = following(model_type)
        norms = [block.shared_norm for block in model.moe_blocks().values()]
        assert [type(norm).__name__ for norm in norms] == [name] * 2
        assert len({id(parameter) for norm in norms if norm is not None for parameter in norm.parameters()}) == len(
            [parameter for norm in norms if norm is not None for parameter in norm.parameters()]
        )
    fresh = moesaic.build(model.config.get_text_config(), model.config.spec)
    for block in fresh.moe_blocks().values():
        assert block.shared_norm is not None
        assert bool(torch.as_tensor(block.shared_norm.weight == 1).all())


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_changes_no_gradient(reentrant: bool) -> None:
    ids, results = token_ids(), []
    for checkpointing in (False, True):
        network = copy_of(following()).train()
        if checkpointing:
            network.gradient_checkpointing_enable({"use_reentrant": reentrant})
            network.enable_input_require_grads()
        network(ids, labels=ids).loss.backward()
        results.append(gradients(network))
    assert_same_gradients(results[1], results[0], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_cached_generation_equals_whole_passes(model_type: str) -> None:
    model, ids = following(model_type), token_ids(2, 9)
    expected = greedy(model, ids)
    assert torch.equal(model.generate(ids, **GREEDY), expected)
    assert torch.equal(model.generate(ids, use_cache=False, **GREEDY), expected)


@pytest.mark.skipif(not decode.available(), reason="the native library was not built")
def test_it_runs_behind_layers_that_are_native_calls() -> None:
    model, ids = following(), token_ids(1, 6)
    expected = greedy(model, ids)
    with moesaic.fast_decoding(model) as fast:
        assert torch.equal(model.generate(ids, **GREEDY), expected)
    assert fast.counts["decoder layers"] == 3


def test_checkpoints_keep_it(tmp_path) -> None:
    model, ids = following(), token_ids()
    model.save_pretrained(tmp_path)
    loaded, report = MoesaicForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_hidden_states_are_those_behind_it() -> None:
    model, ids = following(), token_ids()
    output = model(ids, output_hidden_states=True)
    torch.testing.assert_close(model.lm_head(output.hidden_states[-1]), output.logits)


def test_accounting_counts_it_as_shared_experts() -> None:
    accounting = account(following())
    assert accounting.parts["shared experts"].total == 2 * 3 * 32 * 20
    assert accounting.parts["norms"].total == (3 * 2 + 1 + 2) * 32
    assert accounting.total == sum(parameter.numel() for parameter in following().parameters())
    assert {plan.shared_width for plan in accounting.layers} == {0, 20}


def test_export_refuses_by_name() -> None:
    with pytest.raises(UnsupportedExport, match=r"shared_experts.placement = 'after' \(there it is 'parallel'\)"):
        moesaic.export(following("qwen3", layers={}))


@pytest.mark.parametrize("model_type", ["olmo2", "gemma2", "granite"])
def test_families_that_do_more_around_a_feed_forward_network_are_refused(model_type: str) -> None:
    with pytest.raises(ConfigError, match=r"moe.shared_experts.placement = 'after' .*use placement: parallel"):
        following(model_type)


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"shared_experts": {"placement": "after", "sigmoid_gate": True}}, "shared_experts.sigmoid_gate"),
        ({"shared_experts": {"placement": "after"}, "depth": {"capacity": 0.5}}, "shared_experts.placement"),
        ({"shared_experts": {"placement": "before"}}, "shared_experts.placement"),
    ],
)
def test_what_does_not_go_with_it_is_refused(values: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        MoESpec.from_dict({"experts": {"num_experts": 4, "intermediate_size": 8}, "router": {"top_k": 2}, **values})
    assert caught.value.field.endswith(field)


def test_a_block_of_its_own_follows_when_asked() -> None:
    spec = MoESpec.from_dict(
        {"experts": {"num_experts": 4, "intermediate_size": 8}, "router": {"top_k": 2}, "shared_experts": AFTER}
    )
    block, x_TD = MoEBlock(spec, 16), torch.randn(5, 16)
    assert isinstance(block.shared_norm, nn.RMSNorm)
    assert block.shared_experts is not None
    routed = block(x_TD)
    torch.testing.assert_close(block.follow(x_TD) - x_TD, block.shared_experts(block.shared_norm(x_TD)))
    block.shared_experts = None
    assert torch.equal(block(x_TD), routed)
