"""What every model must hold, whatever its router: the rows are those of the layers' shared matrix."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.hf.router_models import extras, inputs, router_model
from tests.layer.router_rows import ROUTERS, N
from torch import Tensor
from transformers import AutoModelForCausalLM

import moesaic
from moesaic import MoesaicForCausalLM
from moesaic.errors import ConfigError, UnsupportedDecoding
from moesaic.layer import loads_of

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(scope="module", params=ROUTERS)
def model(request: pytest.FixtureRequest) -> MoesaicForCausalLM:
    return router_model(request.param).eval()


def run(model: MoesaicForCausalLM, ids: Tensor, **arguments: Any) -> Any:
    return model(ids, **extras(model, ids), **arguments)


def test_saved_and_loaded_model_gives_the_same_logits(model: MoesaicForCausalLM, tmp_path: Path) -> None:
    ids = inputs()["input_ids"]
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(run(loaded, ids).logits, run(model, ids).logits)
    expected, found = model.state_dict(), loaded.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) and expected[name].dtype == found[name].dtype for name in found)


def test_fresh_weights_are_initialised(model: MoesaicForCausalLM) -> None:
    torch.manual_seed(3)
    fresh = moesaic.build(copy.deepcopy(model.config.backbone), model.config.spec)
    assert all(tensor.isfinite().all() for tensor in fresh.state_dict().values())
    ids = inputs()["input_ids"]
    assert run(fresh, ids, labels=ids).loss.isfinite()


@torch.no_grad()
def test_cached_generation_equals_uncached_or_is_refused(model: MoesaicForCausalLM) -> None:
    ids = inputs(2, 6)["input_ids"]
    spec = model.config.spec
    if spec.unservable:
        with pytest.raises(UnsupportedDecoding, match=r"moe\.router: "):
            model.generate(ids, max_new_tokens=2, **extras(model, ids))
        cache = run(model, ids, use_cache=True).past_key_values
        with pytest.raises(UnsupportedDecoding, match="decoding token by token"):
            run(model, ids[:, :1], past_key_values=cache)
        return
    if spec.router.needs - {"token_ids"}:
        # generate() knows no rule by which modalities or tasks of new tokens follow from those of the prompt.
        whole = run(model, ids).logits
        cache, steps = None, []
        given = extras(model, ids)
        for position in range(ids.shape[1]):
            now = {name: v[:, position : position + 1] if v.ndim == 2 else v for name, v in given.items()}
            output = model(ids[:, position : position + 1], past_key_values=cache, use_cache=True, **now)
            cache = output.past_key_values
            steps.append(output.logits)
        torch.testing.assert_close(torch.cat(steps, 1), whole, **CLOSE)
        return
    arguments: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    arguments |= {"output_logits": True, "return_dict_in_generate": True}
    cached, uncached = (model.generate(ids, use_cache=use, **arguments) for use in (True, False))
    assert torch.equal(cached.sequences, uncached.sequences)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(uncached.logits), **CLOSE)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_neither_loss_nor_gradients(model: MoesaicForCausalLM, reentrant: bool) -> None:
    ids = inputs()["input_ids"]
    results = []
    for checkpointed in (False, True):
        trained = copy.deepcopy(model).train()
        if checkpointed:
            trained.gradient_checkpointing_enable({"use_reentrant": reentrant})
            trained.enable_input_require_grads()
        torch.manual_seed(7)
        loss = run(trained, ids, labels=ids, use_cache=False).loss
        loss.backward()
        found = {name: parameter.grad for name, parameter in trained.named_parameters()}
        results.append((loss.detach(), {name: torch.zeros(()) if g is None else g for name, g in found.items()}))
    (expected_loss, expected), (loss, found) = results
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=1e-7)
    for name, gradient in expected.items():
        torch.testing.assert_close(
            found[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_bfloat16_model_runs_forward_and_backward(model: MoesaicForCausalLM) -> None:
    ids = inputs()["input_ids"]
    half = copy.deepcopy(model).bfloat16().train()
    loss = run(half, ids, labels=ids).loss
    loss.backward()
    assert loss.isfinite()
    assert all(parameter.grad.isfinite().all() for parameter in half.parameters() if parameter.grad is not None)


@torch.no_grad()
def test_padding_changes_nothing(model: MoesaicForCausalLM) -> None:
    if "other_sequences" in model.config.spec.depends_on(training=False):
        pytest.skip("its routing depends on the other sequences")
    ids = inputs(1, 6)["input_ids"]
    alone = run(model, ids).logits[0]
    padded, mask = torch.zeros(2, 9, dtype=torch.int64), torch.zeros(2, 9, dtype=torch.int64)
    padded[1], mask[1] = inputs(1, 9, seed=2)["input_ids"][0], 1
    padded[0, :6], mask[0, :6] = ids[0], 1
    together = run(model, padded, attention_mask=mask).logits
    torch.testing.assert_close(together[0, :6], alone, **CLOSE)


def test_training_reaches_every_parameter_it_should(model: MoesaicForCausalLM) -> None:
    trained = copy.deepcopy(model).train()
    ids = inputs(4, 12)["input_ids"]
    run(trained, ids, labels=ids).loss.backward()
    router = trained.moe_blocks()[0].gate
    parameters = dict(router.named_parameters())
    missing = {name for name, parameter in parameters.items() if parameter.requires_grad and parameter.grad is None}
    assert missing <= {name for row in ROUTERS.values() for name in row.unreached}


def test_load_of_every_layer_is_counted(model: MoesaicForCausalLM) -> None:
    ids = inputs()["input_ids"]
    with torch.no_grad():
        context = run(model, ids, output_routing=True).routing
    loads = loads_of(context)
    assert list(loads) == [0, 2]
    for load in loads.values():
        assert load.tokens == ids.numel()
        assert load.load_N.shape == (N,)
        assert load.load_N.sum() > 0


def test_missing_input_of_a_router_is_named(model: MoesaicForCausalLM) -> None:
    needs = model.config.spec.router.needs
    if not needs:
        pytest.skip("looks at hidden states only")
    embeddings = model.get_input_embeddings()(inputs()["input_ids"])
    with pytest.raises(ConfigError, match=r"(input_ids|modality_ids|task_ids) = None is required"):
        model(inputs_embeds=embeddings)
