"""Every family that can be a backbone: replacing its feed-forward networks by copies leaves what it computes as it was."""

from __future__ import annotations

import re

import pytest
import torch
from tests.hf.tiny import DENSE_FAMILIES, dense_model, gradients, token_ids
from tests.parity.stock_models import FAMILIES as MOE_FAMILIES
from tests.parity.stock_models import stock_config
from transformers import AutoConfig, AutoModelForCausalLM

import moesaic
from moesaic.errors import UnsupportedModel
from moesaic.hf.families import FAMILIES, REFUSED, family_of
from moesaic.transform import copy_spec


def test_every_family_is_tested() -> None:
    assert set(FAMILIES) == set(DENSE_FAMILIES) | set(MOE_FAMILIES)


@pytest.mark.parametrize("model_type", DENSE_FAMILIES)
def test_surgery_preserves_the_function(model_type: str) -> None:
    dense, ids = dense_model(model_type), token_ids()
    model = moesaic.upcycle(dense, copy_spec(dense, num_experts=4, top_k=2))
    assert list(model.moe_blocks()) == [0, 1, 2]

    expected, actual = dense(ids, labels=ids), model(ids, labels=ids)
    torch.testing.assert_close(actual.logits, expected.logits, rtol=1e-4, atol=3e-5)
    expected.loss.backward()
    actual.loss.backward()
    kept = gradients(dense)
    embedding = model.get_input_embeddings().weight.grad
    torch.testing.assert_close(embedding, dense.get_input_embeddings().weight.grad, rtol=1e-4, atol=1e-5)
    for name, parameter in model.model.backbone.named_parameters():
        if f"{dense.base_model_prefix}.{name}" in kept:
            torch.testing.assert_close(parameter.grad, kept[f"{dense.base_model_prefix}.{name}"], rtol=1e-4, atol=1e-5)

    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(ids, **options), dense.generate(ids, **options))


@pytest.mark.parametrize("model_type", ["gpt2", "starcoder2"])
def test_dropout_of_the_feed_forward_network_is_kept(model_type: str) -> None:
    dense, ids = dense_model(model_type).train(), token_ids()
    model = moesaic.upcycle(dense, copy_spec(dense, num_experts=1, top_k=1))
    outputs = []
    for network in (dense, model):
        torch.manual_seed(0)
        outputs.append(network(ids).logits)
    assert not torch.allclose(outputs[0], dense.eval()(ids).logits, atol=1e-3)
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model_type", DENSE_FAMILIES)
def test_checkpoints_of_every_family(model_type: str, tmp_path) -> None:
    dense, ids = dense_model(model_type), token_ids()
    model = moesaic.upcycle(dense, copy_spec(dense, num_experts=4, top_k=2))
    model.save_pretrained(tmp_path)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert torch.equal(loaded.eval()(ids).logits, model(ids).logits)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_build_routes_in_every_family(model_type: str) -> None:
    config = dense_model(model_type).config if model_type in DENSE_FAMILIES else stock_config(model_type)
    spec = {"experts": {"num_experts": 4, "intermediate_size": 8}, "router": {"top_k": 2}}
    model = moesaic.build(config, spec).train()
    output = model(token_ids(), labels=token_ids(), output_routing=True)
    assert list(output.routing.records) == list(range(config.num_hidden_layers))
    output.loss.backward()
    for block in model.moe_blocks().values():
        assert block.gate.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("model_type", [name for name in REFUSED if name not in ("t5", "bart", "mamba")])
def test_refusals_say_why(model_type: str) -> None:
    config = AutoConfig.for_model(model_type)
    with pytest.raises(UnsupportedModel, match=re.escape(REFUSED[model_type])) as error:
        moesaic.build(config, {"experts": {"num_experts": 4, "intermediate_size": 8}, "router": {"top_k": 2}})
    assert "llama" in str(error.value)


def test_an_unlisted_family_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="have not been verified"):
        family_of(AutoConfig.for_model("phi"))
