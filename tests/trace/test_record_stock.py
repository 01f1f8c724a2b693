"""Traces of stock models against what their own routers return."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tests.parity.stock_models import COMMON, FAMILIES, LATENT_ATTENTION, stock_model, token_ids
from tests.trace import models
from tests.trace.stock_families import ROUTERS, tiny_model
from tests.trace.storage.test_file import assert_same
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, LlamaConfig, PreTrainedModel

from moesaic.errors import TraceError, UnsupportedModel
from moesaic.hf.router_presets import ROUTER_PRESETS
from moesaic.trace import RoutingTrace, TraceFile, record

NAMED = ("mixtral", "qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss")
IDS = token_ids()


class Heard:
    """Hooks of the test's own on every module of a router's class: the outputs in the order of their calls."""

    def __init__(self, model: nn.Module) -> None:
        self.outputs: dict[int, list[Any]] = {}
        self._handles = []
        for name, module in model.named_modules():
            if type(module).__name__ in ROUTER_PRESETS:
                layer = next(int(part) for part in name.split(".") if part.isdigit())
                self._handles.append(module.register_forward_hook(self._hook(layer)))

    def _hook(self, layer: int) -> Any:
        return lambda module, args, output: self.outputs.setdefault(layer, []).append(output)

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


@contextmanager
def heard(model: nn.Module) -> Iterator[Heard]:
    found = Heard(model)
    try:
        yield found
    finally:
        found.remove()


def dense(choice_TK: Tensor, weight_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    weight_TN = torch.zeros(len(choice_TK), num_experts).scatter(1, choice_TK.long(), weight_TK.float())
    return weight_TN, torch.zeros(len(choice_TK), num_experts).scatter(1, choice_TK.long(), 1.0)


def assert_is_what_routers_returned(
    trace: RoutingTrace, found: Heard, forwards: int = 1, real_T: Any = None, scale: float = 1.0
) -> None:
    """Experts and weights, the latter with what the block multiplies its output by."""
    assert trace.layers.keys() == found.outputs.keys()
    rows = list(trace.rows())
    for layer, facts in trace.header.layers.items():
        outputs = found.outputs[layer][:forwards]
        weight_TK = torch.cat([weight.reshape(-1, facts.top_k) * scale for _, weight, _ in outputs])
        index_TK = torch.cat([index.reshape(-1, facts.top_k) for *_, index in outputs])
        if real_T is not None:
            weight_TK, index_TK = weight_TK[real_T], index_TK[real_T]
        mine = [each for each in rows if each.layer == layer]
        actual = dense(
            torch.cat([each.choice_TK for each in mine]),
            torch.cat([each.weight_TK for each in mine]),
            facts.num_experts,
        )
        for one, other in zip(actual, dense(index_TK, weight_TK, facts.num_experts), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_the_trace_is_what_the_routers_returned_and_outputs_stay(model_type):
    model = stock_model(model_type)
    with torch.no_grad():
        expected = model(IDS).logits
        with record(model) as trace, heard(model) as found:
            logits = model(IDS).logits
        after = model(IDS).logits
    assert torch.equal(logits, expected)
    assert torch.equal(after, expected)
    assert trace.num_tokens == IDS.numel()
    assert trace.token_ids_T.tolist() == IDS.flatten().tolist()
    assert_is_what_routers_returned(trace, found)
    assert not any(hasattr(module, "_forward_hooks") and module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("name", ROUTERS)
def test_further_families(name):
    preset = ROUTER_PRESETS[name]
    model = tiny_model(preset)
    with torch.no_grad():
        expected = model(IDS).logits
        with record(model) as trace, heard(model) as found:
            assert torch.equal(model(IDS).logits, expected)
    assert trace.num_tokens == IDS.numel()
    scale = 1.0 if preset.block_scale is None else preset.block_scale(model.config)
    assert_is_what_routers_returned(trace, found, scale=scale)


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "olmoe", "gpt_oss"])
def test_picks_are_the_best_of_output_router_logits(model_type):
    model = stock_model(model_type)
    with torch.no_grad(), record(model, scores=True) as trace:
        logits = model(IDS, output_router_logits=True).router_logits
    for rows, logits_TN in zip(trace.rows(), logits, strict=True):
        best = logits_TN.topk(rows.choice_TK.shape[1], dim=-1)
        assert torch.equal(rows.choice_TK.long(), best.indices)  # best first
        torch.testing.assert_close(rows.scores_TM, logits_TN.softmax(-1))


@pytest.mark.parametrize("model_type", NAMED)
def test_generation_with_padding_and_a_cache(model_type, tmp_path):
    model = stock_model(model_type)
    mask = torch.ones_like(IDS)
    mask[1, :5] = 0
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(IDS, attention_mask=mask, **options)
    with record(model) as trace, record(model, tmp_path / "a"), heard(model) as found:
        output = model.generate(IDS, attention_mask=mask, **options)
    assert torch.equal(output, expected)
    assert trace.num_tokens == 24 - 5 + 3 * 2
    real_T = torch.cat([mask.flatten().bool(), torch.ones(6, dtype=torch.bool)])
    assert_is_what_routers_returned(trace, found, forwards=4, real_T=real_T)
    rows = list(TraceFile(tmp_path / "a").rows())
    assert_same(rows, list(trace.rows()))
    documents = torch.cat([each.tokens.document_T for each in rows if each.layer == rows[-1].layer])
    tokens = torch.cat([each.tokens.token_T for each in rows if each.layer == rows[-1].layer])
    positions = torch.cat([each.tokens.position_T for each in rows if each.layer == rows[-1].layer])
    for row, first in ((0, 0), (1, 5)):
        assert tokens[documents == row].tolist() == output[row, first:-1].tolist()
        assert positions[documents == row].tolist() == list(range(15 - first))


def test_a_loop_of_ones_own_with_a_cache_makes_one_document_of_each_row():
    for model in (stock_model("qwen3_moe"), our_model()):
        mask = torch.ones_like(IDS)
        mask[1, :5] = 0
        with torch.no_grad(), record(model) as trace:
            cache = model(IDS[:, :8], attention_mask=mask[:, :8], use_cache=True).past_key_values
            model(IDS[:, 8:10], attention_mask=mask[:, :10], past_key_values=cache)
            model(IDS[:, 10:], attention_mask=mask, past_key_values=cache)
        rows = list(trace.rows({1}))
        documents = torch.cat([each.tokens.document_T for each in rows])
        positions = torch.cat([each.tokens.position_T for each in rows])
        assert documents.bincount().tolist() == [12, 7]
        assert positions[documents == 0].tolist() == list(range(12))
        assert positions[documents == 1].tolist() == list(range(7))


def our_model() -> PreTrainedModel:
    return models.tiny_model({"vocab_size": COMMON["vocab_size"]})


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("model_type", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_training_under_checkpointing_records_the_first_run(model_type, reentrant):
    model = stock_model(model_type).train()
    with record(model) as plain, heard(model) as found:
        loss = model(IDS, labels=IDS).loss
        loss.backward()
    gradients = {
        name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    model.zero_grad()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    with record(model) as trace:
        again = model(IDS, labels=IDS).loss
        again.backward()
    assert torch.equal(again, loss)
    assert_is_what_routers_returned(plain, found)
    assert_same(list(trace.rows()), list(plain.rows()))
    for name, parameter in model.named_parameters():
        if name in gradients:
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-6)


def test_low_precision_records_the_picks_that_were_made():
    model = stock_model("qwen3_moe").to(torch.bfloat16)
    with torch.no_grad(), record(model) as trace, heard(model) as found:
        model(IDS)
    assert_is_what_routers_returned(trace, found)


def test_layers_that_look_token_ids_up_are_recorded():
    config = AutoConfig.for_model(
        "deepseek_v4",
        **{**COMMON, **LATENT_ATTENTION},
        num_local_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        mlp_layer_types=["hash_moe", "moe"],
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    table = next(buffer for name, buffer in model.named_buffers() if name.endswith("tid2eid"))
    with torch.no_grad():
        table.copy_(torch.rand(table.shape[0], 8).argsort(-1)[:, :2])
        with record(model) as trace, heard(model) as found:
            model(IDS)
    assert trace.header.layers[0].router == "hash"
    assert_is_what_routers_returned(trace, found)
    assert torch.equal(trace.layers[0].index_TK.sort(-1).values, table[IDS.flatten()].sort(-1).values)


def test_packed_documents_and_embeddings():
    model = stock_model("olmoe")
    position = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7]] * 2)
    with torch.no_grad(), record(model) as trace:
        model(IDS, position_ids=position)
        model(inputs_embeds=model.get_input_embeddings()(IDS))
        model.model(IDS)
    first, second, third = trace.rows({1})
    assert first.tokens.document_T.unique().tolist() == [0, 1, 2, 3]
    assert first.tokens.position_T.tolist() == position.flatten().tolist()
    assert set(second.tokens.token_T.tolist()) == {-1}
    assert third.tokens.token_T.tolist() == IDS.flatten().tolist()


def test_an_error_in_a_forward_pass_leaves_nothing_behind():
    model = stock_model("mixtral")

    def fail(*_: Any) -> None:
        raise RuntimeError("stop")

    with torch.no_grad(), record(model) as trace:
        handle = model.model.norm.register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="stop"):
            model(IDS)
        handle.remove()
        model(IDS)
    assert trace.num_tokens == IDS.numel()


def test_a_trace_knows_its_stock_model(tmp_path):
    model = stock_model("mixtral")
    with torch.no_grad(), record(model, tmp_path / "a"):
        model(IDS)
    trace = TraceFile(tmp_path / "a")
    assert trace.header.model_type == "mixtral"
    assert trace.header.layers[1].router == "top_k"
    trace.check_model(model)
    with pytest.raises(TraceError, match=r"model_type is 'mixtral' in the trace .* and 'olmoe' in"):
        trace.check_model(stock_model("olmoe"))


def test_what_cannot_be_recorded_is_refused_by_name():
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    dense_model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes, vocab_size=8))
    switch = AutoModelForSeq2SeqLM.from_config(
        AutoConfig.for_model(
            "switch_transformers", d_model=16, d_ff=16, d_kv=8, num_heads=2, num_layers=2, vocab_size=16
        )
    )
    phimoe = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("phimoe", **COMMON, intermediate_size=16, num_local_experts=4)
    )
    for model, reason in (
        (dense_model, "model_type = 'llama' is not a known MoE family"),
        (switch, r"SwitchTransformersForConditionalGeneration \(switch_transformers\) is an encoder-decoder"),
        (phimoe, "phimoe: sparsemixer"),
        (nn.Linear(2, 2), "Linear holds no model of moesaic or transformers"),
    ):
        with pytest.raises(UnsupportedModel, match=reason), record(model):
            pass
